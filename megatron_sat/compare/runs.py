"""Training runs as they recorded themselves, read back: what any comparison stands on.

A run's folder holds ``metrics.jsonl`` (``training.metrics.JsonLines`` writes it): lines of kind "train", a
window of updates, and of kind "validation", the dense loss of each named set. Seconds are those of training
alone, evaluations and checkpoints left out: they cost a dense and a sparse run the same.
"""

import itertools
import json
import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

METRICS = "metrics.jsonl"
Point = TypeVar("Point", "Window", "Validation")


@dataclass(frozen=True, kw_only=True)
class Window:
    """The end of a window of updates."""

    step: int
    elapsed_seconds: float
    """Training time since step 1."""
    loss: float
    """Mean training loss of the window, nats a token."""
    executed_flops: float
    """Total since step 1."""
    consumed_tokens: int
    """Total since step 1."""
    nominal_omission_rate: float
    """Of the window's last step, as the schedule has it."""
    omission_rate: Mapping[str, float]
    """Of the window's last step, by kind of module, what was really left out. Empty: a dense model."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The dense model's loss after some step."""

    step: int
    elapsed_seconds: float
    """Training time until then."""
    loss: Mapping[str, float]
    """By name of the set, nats a token."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: at least one window and one validation, each in the order of steps."""

    name: str
    """What tables and pictures call it."""
    windows: tuple[Window, ...]
    validations: tuple[Validation, ...]

    def __post_init__(self) -> None:
        for what, points in (("train", self.windows), ("validation", self.validations)):
            if not points:
                raise ValueError(
                    f"the run {self.name!r} must have {what} records, it has none; let it train to its end, "
                    "with --log-interval and --eval-interval set"
                )
            steps = [point.step for point in points]  # type: ignore[attr-defined]
            if any(b <= a for a, b in itertools.pairwise(steps)):
                raise ValueError(
                    f"the {what} records of the run {self.name!r} must be in the order of steps, got "
                    f"{steps}; give every run a folder of its own"
                )

    @property
    def steps(self) -> int:
        """Updates recorded."""
        return self.windows[-1].step

    @property
    def seconds(self) -> float:
        """Training time of all of them."""
        return self.windows[-1].elapsed_seconds

    @property
    def spans(self) -> list[tuple[int, float]]:
        """Steps and seconds of each window."""
        ends = [(0, 0.0), *((window.step, window.elapsed_seconds) for window in self.windows)]
        return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends)]

    @property
    def median_step_seconds(self) -> float:
        """Of a step, of the median window: what the first steps cost more does not count."""
        return statistics.median(seconds / steps for steps, seconds in self.spans)

    @property
    def executed_flops(self) -> float:
        """Operations of all of them."""
        return self.windows[-1].executed_flops

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run."""
        return self.windows[-1].consumed_tokens / self.seconds

    @property
    def step_seconds(self) -> float:
        """Of the mean step."""
        return self.seconds / self.steps

    @property
    def final_loss(self) -> Mapping[str, float]:
        """Of the last validation, by name of the set."""
        return self.validations[-1].loss


def read_run(folder: Path, *, name: str) -> Run:
    """The run that left its records in ``folder``.

    Raises ValueError where there are none, a line is no record, and records are missing or not in order.
    """
    path = folder / METRICS
    if not path.is_file():
        raise ValueError(f"{folder} must hold the {METRICS} of a run, it does not; train with --save")
    lines = path.read_text().splitlines()
    entries = [_parse(line, path=path, number=number) for number, line in enumerate(lines, 1)]
    return Run(
        name=name,
        windows=tuple(_points(entries, kind="train", make=_window, path=path)),
        validations=tuple(_points(entries, kind="validation", make=_validation, path=path)),
    )


def steps_that_fit(run: Run, *, seconds: float) -> int:
    """How many steps at the run's own pace fit into ``seconds`` of training, at least one.

    Between two records the time runs evenly, and after the last one at the mean pace of the whole run. Raises
    ValueError where not even one step fits.
    """
    times = [0.0, *(window.elapsed_seconds for window in run.windows)]
    steps = [0, *(window.step for window in run.windows)]
    if seconds >= times[-1]:
        fitting = steps[-1] * seconds / times[-1]
    else:
        after = bisect_left(times, seconds, lo=1)
        share = (seconds - times[after - 1]) / (times[after] - times[after - 1])
        fitting = steps[after - 1] + share * (steps[after] - steps[after - 1])
    count = int(fitting + 1e-6)  # 0.3 / 0.1 steps are three
    if count < 1:
        raise ValueError(
            f"the time to fill must hold one step of {run.name!r} ({times[-1] / steps[-1]:.3g} s), "
            f"got {seconds:.3g} s; compare longer runs"
        )
    return count


def _parse(line: str, *, path: Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or "kind" not in entry:
        raise ValueError(f"{path}:{number} must be a record with a kind, got {line[:60]!r}; remove it, or train again")
    return entry


def _points(
    entries: list[dict[str, Any]], *, kind: str, make: Callable[[dict[str, Any]], Point], path: Path
) -> list[Point]:
    """The points of one kind. A finished run that is started again repeats its last evaluation."""
    try:
        points = [make(entry) for entry in entries if entry["kind"] == kind]
        following = [point.step for point in points[1:]]
        return [p for p, after in itertools.zip_longest(points, following) if p.step != after]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the {kind} records of {path} must be those of this version, {error!r}; train again with it"
        ) from error


def _window(entry: dict[str, Any]) -> Window:
    return Window(
        step=int(entry["step"]),
        elapsed_seconds=float(entry["elapsed_seconds"]),
        loss=float(entry["loss"]),
        executed_flops=float(entry["executed_flops"]),
        consumed_tokens=int(entry["consumed_tokens"]),
        nominal_omission_rate=float(entry["nominal_omission_rate"]),
        omission_rate={kind: float(rate) for kind, rate in entry["omission_rate"].items()},
    )


def _validation(entry: dict[str, Any]) -> Validation:
    return Validation(
        step=int(entry["step"]),
        elapsed_seconds=float(entry["elapsed_seconds"]),
        loss={name: float(loss) for name, loss in entry["loss"].items()},
    )
