"""Predictions beside what the benchmarks measured: layers, steps, whole runs; each with its error.

What a benchmark left is read as it is; which configuration it stands for is the caller's to know.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

CHANGE = 2
"""Steps of a rung, from its first, in which shapes are new: memory is found anew, kernels are chosen and compiled."""
ENOUGH = 3
"""Steps behind those from which a rung's steady seconds are the median."""
OURS = ("dense", "compact")
"""Rows of the program's default; gathered weights and plain PyTorch are not predicted."""
StepSeconds = Callable[[Fraction], float]
"""(omission rate) -> predicted seconds of a step."""
LayerSeconds = Callable[[str, int, Fraction], float]
"""(model, tokens, omission rate) -> predicted seconds of a layer's micro-batch on the device."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One figure, twice."""

    what: str
    predicted: float
    measured: float
    beyond: float | None = None
    """Of steps of a run: what they took beyond ``measured``, in first steps and changes of rung. Not predicted."""

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.measured - 1


def kind_of(found: Mapping[str, Any]) -> Literal["step", "ladder", "layer"]:
    """Which benchmark left this. Raises ValueError for anything else, and for what does not say its size and rates."""
    rows = found.get("rows") or [{}]
    records = [record for run in found.get("runs", {}).values() for record in run]
    if "runs" in found:
        if "size" in found and all("nominal_omission_rate" in record for record in records):
            return "ladder"
    elif "layer_seconds" in rows[0]:
        return "layer"
    elif "seconds" in rows[0] and "size" in found:
        return "step"
    raise ValueError(
        "--compare must be what bench_step, bench_ladder or bench_layer wrote, with its size and each step's rate; "
        "got something else, or a file from before they wrote that: measure again with --out"
    )


def compare_layers(rows: Iterable[Mapping[str, Any]], *, predict: LayerSeconds) -> list[Compared]:
    """Rows of bench_layer: the device's time."""
    return [
        Compared(
            what=f"layer of {row['model']}, {row['tokens']} tokens, rate {row['rate']:g}",
            predicted=predict(row["model"], row["tokens"], exact(row["rate"])),
            measured=row["layer_seconds"],
        )
        for row in rows
        if row["weights"] in OURS
    ]


def compare_steps(rows: Iterable[Mapping[str, Any]], *, predict: StepSeconds) -> list[Compared]:
    """Rows of bench_step."""
    return [
        Compared(what=f"step at rate {row['rate']:g}", predicted=predict(exact(row["rate"])), measured=row["seconds"])
        for row in rows
        if row["weights"] in OURS
    ]


def compare_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, predict: StepSeconds) -> list[Compared]:
    """Runs of bench_ladder: the steady step of every rung, and all steps of these rungs as if they were steady.

    Rungs too short to tell are left out; the steps of the others are counted in the name of the sum.
    """
    found = []
    for name, records in runs.items():
        by_rate = defaultdict[Fraction, list[float]](list)
        for record in records:
            by_rate[exact(record["nominal_omission_rate"])].append(record["step_seconds"])
        rungs = {rate: seconds for rate, seconds in by_rate.items() if len(seconds) >= CHANGE + ENOUGH}
        steady = {rate: statistics.median(seconds[CHANGE:]) for rate, seconds in rungs.items()}
        for rate, seconds in steady.items():
            what = f"{name}: step at rate {float(rate):g}"
            found.append(Compared(what=what, predicted=predict(rate), measured=seconds))
        if rungs:
            steps = {rate: len(seconds) for rate, seconds in rungs.items()}
            measured = sum(number * steady[rate] for rate, number in steps.items())
            found.append(
                Compared(
                    what=f"{name}: {sum(steps.values())} of {len(records)} steps",
                    predicted=sum(number * predict(rate) for rate, number in steps.items()),
                    measured=measured,
                    beyond=sum(sum(seconds) for seconds in rungs.values()) - measured,
                )
            )
    return found


def exact(rate: float) -> Fraction:
    """The rate that was written down as ``rate``."""
    return Fraction(rate).limit_denominator(10**4)
