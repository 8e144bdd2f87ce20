"""The paper's two ladders with fewer steps, what the program takes for each step, and what that says of the whole."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from benchmarks.program import PAPER, ROOT
from megatron_sat.build import kept_of, recompute_of
from megatron_sat.config import Config
from megatron_sat.estimate.accuracy import CHANGE, ENOUGH
from megatron_sat.model.flops import ModelShape, step_flops
from megatron_sat.sparsity.schedule import Rung, ScheduleConfig, build_schedule

Records = Sequence[dict[str, Any]]
"""Of a run's metrics, one a step."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """One of the paper's schedules."""

    omission_rate: Fraction
    steps: int
    starts: int
    """The paper's η."""
    rungs: int

    def start(self, steps: int) -> int:
        """η of a run of ``steps``. Raises ValueError where it would be no whole step, or the ladder has no step."""
        start = Fraction(self.starts * steps, self.steps)
        if start.denominator > 1 or not 0 < start < steps:
            whole = Fraction(self.starts, self.steps).denominator
            raise ValueError(
                f"--ladders must have a multiple of {whole} steps, for the ladder starts at {self.starts} of "
                f"{self.steps}, got {steps}; try {max(round(steps / whole), 1) * whole}"
            )
        return int(start)

    def schedule(self, steps: int) -> list[Rung]:
        """The rungs of a run of ``steps``; those too short for a step are not among them."""
        config = ScheduleConfig(
            kind="ladder",
            omission_rate=self.omission_rate,
            start=self.start(steps),
            rungs=self.rungs,
            train_iters=steps,
        )
        return build_schedule(config).rungs()

    def flags(self, steps: int) -> str:
        """The program's."""
        start = f"--sat-schedule-start {self.start(steps)} --sat-rungs {self.rungs}"
        return f"--sat-schedule ladder --sat-omission-rate {self.omission_rate} {start} {PAPER}"


LADDERS = {
    "cpt": Ladder(omission_rate=Fraction(1, 2), steps=3000, starts=2000, rungs=5),
    "sft": Ladder(omission_rate=Fraction(24, 25), steps=1200, starts=600, rungs=1),
}


class Train(Protocol):
    """Trains what a command line describes, to its end; `run_program`, or what a test has in its place."""

    def __call__(self, argv: Sequence[str], *, log: Path) -> list[dict[str, Any]]: ...


def run_program(
    argv: Sequence[str], *, log: Path, program: Sequence[str] = (sys.executable, str(ROOT / "pretrain_sat.py"))
) -> list[dict[str, Any]]:
    """Train as a process of pretrain_sat.py; its metrics of every step. log: the file they go through.

    Raises RuntimeError, with the last lines that it said, where it fails.
    """
    command = [*program, *argv, "--log-interval", "1", "--log-jsonl", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"the program must end with exit code 0, got {done.returncode}; it said:\n{said}")
    return read_records(log)


def read_records(log: Path) -> list[dict[str, Any]]:
    """The steps of a run's metrics."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def compare(
    ladder: Ladder, *, steps: int, dense: Records, sparse: Records, shape: ModelShape, config: Config
) -> dict[str, Any]:
    """What a run of ``steps`` saved over the dense run's first ``steps``, and what the paper's length would."""
    here, there = ladder.schedule(steps), ladder.schedule(ladder.steps)
    operations = {rung.rate: _operations(rung.rate, shape=shape, config=config) for rung in [*here, *there]}
    dense_operations = _operations(Fraction(0), shape=shape, config=config)
    dense_seconds, sparse_seconds = _seconds(dense)[:steps], _seconds(sparse)
    dense_steady = statistics.median(dense_seconds[CHANGE:] or dense_seconds)
    steady, known = _steady(here, sparse_seconds, operations=operations, dense=(dense_operations, dense_steady))
    measured = {str(rung.rate): steady(operations[rung.rate]) for rung in here}
    executed = sum(rung.steps * operations[rung.rate] for rung in there)
    lost = sum(sparse_seconds) - sum(rung.steps * steady(operations[rung.rate]) for rung in here)
    dense_lost = sum(dense_seconds) - steps * dense_steady
    paper_dense = ladder.steps * dense_steady + dense_lost
    paper = sum(rung.steps * steady(operations[rung.rate]) for rung in there) + lost
    return {
        "steps": steps,
        "dense_seconds": sum(dense_seconds),
        "sparse_seconds": sum(sparse_seconds),
        "saved": 1 - sum(sparse_seconds) / sum(dense_seconds),
        "bound": 1 - sum(rung.steps * operations[rung.rate] for rung in here) / (steps * dense_operations),
        "steady_seconds": {"dense run": dense_steady} | measured,
        "beyond_steady_seconds": {"dense": dense_lost, "sparse": lost},
        "paper_steps": ladder.steps,
        "paper_dense_seconds": paper_dense,
        "paper_sparse_seconds": paper,
        "paper_saved": 1 - paper / paper_dense,
        "paper_bound": 1 - executed / (ladder.steps * dense_operations),
        "remarks": _remarks(here, there, known=known, lost=lost, dense_lost=dense_lost),
    }


def _seconds(records: Records) -> list[float]:
    return [float(record["step_seconds"]) for record in records]


def _operations(rate: Fraction, *, shape: ModelShape, config: Config) -> int:
    """Of a step at ``rate``."""
    training = config.training
    kept = kept_of(config, shape=shape, rate=rate)
    return step_flops(
        shape, kept, tokens=training.global_batch_size * shape.seq_length, recompute=recompute_of(config)
    )


class _Line:
    """Steady seconds by operations: straight between the points that are known, and beyond them."""

    def __init__(self, points: dict[int, float]) -> None:
        self.points = sorted(points.items())

    def __call__(self, operations: int) -> float:
        exact = dict(self.points).get(operations)
        if exact is not None or len(self.points) == 1:
            return self.points[0][1] if exact is None else exact
        after = next((i for i, (at, _) in enumerate(self.points) if at > operations), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[max(after - 1, 0)], self.points[max(after, 1)]
        return y0 + (y1 - y0) * (operations - x0) / (x1 - x0)


def _steady(
    rungs: Sequence[Rung], seconds: Sequence[float], *, operations: dict[Fraction, int], dense: tuple[int, float]
) -> tuple[_Line, set[Fraction]]:
    """Seconds of a settled step by its operations, and the rates at which they were measured."""
    points, known = dict([dense]), set()
    for rung in rungs:
        settled = seconds[rung.first - 1 + CHANGE : rung.last]
        if len(settled) >= ENOUGH:
            points[operations[rung.rate]] = statistics.median(settled)
            known.add(rung.rate)
    return _Line(points), known


def _remarks(
    here: Sequence[Rung], there: Sequence[Rung], *, known: set[Fraction], lost: float, dense_lost: float
) -> list[str]:
    absent = [f"{float(rung.rate):g}" for rung in there if rung.rate not in {each.rate for each in here}]
    guessed = [f"{float(rung.rate):g}" for rung in there if rung.rate not in known]
    remarks = [f"first steps and changes of rung: {lost:.2f} s beyond steady ones; in the dense run {dense_lost:.2f} s"]
    if absent:
        remarks.append(f"too few steps for the rung(s) of rate {', '.join(absent)}: their change is in no sum")
    if guessed:
        remarks.append(f"steady seconds between those of other rungs, by operations: rate {', '.join(guessed)}")
    return remarks
