"""Predictions beside what the benchmarks measured: layers, steps, whole runs; each with its error.

What a benchmark left is read as it is; which configuration it stands for is the caller's to know.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

SETTLED = 3
"""Steps of one rate from which their median is compared; fewer are in the sum of the run alone."""
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

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.measured - 1


def kind_of(found: Mapping[str, Any]) -> Literal["step", "ladder", "layer"]:
    """Which benchmark left this. Raises ValueError for anything else, and for a step that does not say its size."""
    rows = found.get("rows") or [{}]
    if "runs" in found and "size" in found:
        return "ladder"
    if "layer_seconds" in rows[0]:
        return "layer"
    if "seconds" in rows[0] and "size" in found:
        return "step"
    raise ValueError(
        "--compare must be what bench_step, bench_ladder or bench_layer wrote, with its size; got something else, or a "
        "file from before they wrote it: measure again with --out"
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
    """Runs of bench_ladder: settled steps by rate, and all steps together, the first ones included."""
    found = []
    for name, records in runs.items():
        by_rate = defaultdict[Fraction, list[float]](list)
        for record in records:
            by_rate[exact(record["nominal_omission_rate"])].append(record["step_seconds"])
        for rate, seconds in by_rate.items():
            if len(seconds) >= SETTLED:
                what = f"{name}: step at rate {float(rate):g}"
                found.append(Compared(what=what, predicted=predict(rate), measured=statistics.median(seconds)))
        predicted = sum(len(seconds) * predict(rate) for rate, seconds in by_rate.items())
        measured = sum(sum(seconds) for seconds in by_rate.values())
        found.append(Compared(what=f"{name}: all {len(records)} steps", predicted=predicted, measured=measured))
    return found


def exact(rate: float) -> Fraction:
    """The rate that was written down as ``rate``."""
    return Fraction(rate).limit_denominator(10**4)
