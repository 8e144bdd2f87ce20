"""The loop with an engine that only counts: what happens after which step, and where it stops."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from megatron_sat.engines.base import StepResult
from megatron_sat.sparsity.controller import Controller
from megatron_sat.training.loop import Extent, Moments, Progress, due, train


class Dense:
    """A schedule that never omits."""

    last_step = 100

    def rate(self, step: int) -> Fraction:
        return Fraction(0)


class CountingEngine:
    """Reads its micro-batches and reports their sum as the loss."""

    def train_step(self, micro_batches: Iterator[int], *, num_micro_batches: int) -> StepResult:
        total = sum(next(micro_batches) for _ in range(num_micro_batches))
        return StepResult(loss=total, num_tokens=1, grad_norm=0.0, learning_rate=0.1, skipped=False)


EXTENT = Extent(
    train_iters=6, num_micro_batches=2, global_batch_size=2, log_interval=2, eval_interval=3, save_interval=4
)


def samples_after(consumed: int) -> Iterator[int]:
    """Of 12 samples; as a data loader, it refuses to be made where none is left."""
    assert consumed < 12, "nothing to read"
    return iter(range(consumed, 12))


def run(
    extent: Extent = EXTENT,
    *,
    start: int = 0,
    stop: Callable[[float], bool] = lambda minutes: False,
    save: Callable[[], bool] = lambda: False,
) -> tuple[Progress, list[tuple[Any, ...]]]:
    """The loop's progress and everything it called, in order."""
    seen: list[tuple[Any, ...]] = []
    moments = Moments(
        stepped=lambda step, result, seconds: seen.append(("step", step, result.loss)),
        log=lambda: seen.append(("log",)),
        evaluate=lambda step: seen.append(("evaluate", step)),
        save=lambda progress: seen.append(("save", progress.iteration, progress.consumed_samples)),
        should_stop=stop,
        should_save=save,
    )
    progress = train(
        CountingEngine(),  # type: ignore[arg-type]
        Controller([], schedule=Dense(), interval=1),
        progress=Progress(iteration=start, consumed_samples=2 * start),
        extent=extent,
        batches=samples_after,
        moments=moments,
    )
    return progress, seen


def test_each_step_reads_the_next_micro_batches() -> None:
    _, seen = run()
    assert [loss for kind, *rest in seen if kind == "step" for loss in rest[1:]] == [1, 5, 9, 13, 17, 21]


def test_moments_come_in_their_intervals_and_after_the_last_step() -> None:
    _, seen = run()
    between = [entry for entry in seen if entry[0] != "step"]
    assert between == [
        ("log",),
        ("evaluate", 3),
        ("log",),
        ("save", 4, 8),
        ("log",),
        ("evaluate", 6),
        ("save", 6, 12),
    ]


def test_a_resumed_loop_does_what_the_rest_of_an_uninterrupted_one_does() -> None:
    whole, rest = run()[1], run(start=3)[1]
    assert rest == whole[whole.index(("evaluate", 3)) + 1 :]


def test_a_finished_run_is_evaluated_once_and_nothing_else() -> None:
    progress, seen = run(start=6)
    assert seen == [("evaluate", 6)] and progress.iteration == 6


def test_exit_interval_logs_saves_and_stops() -> None:
    progress, seen = run(replace(EXTENT, exit_interval=5))
    assert progress == Progress(iteration=5, consumed_samples=10)
    assert seen[-2:] == [("log",), ("save", 5, 10)]


def test_a_wish_to_save_is_obeyed_after_the_step_and_the_run_goes_on() -> None:
    wishes = iter([False, True, False, False, False, False])
    progress, seen = run(save=lambda: next(wishes))
    assert progress.iteration == 6
    assert [entry for entry in seen if entry[0] == "save"] == [("save", 2, 4), ("save", 4, 8), ("save", 6, 12)]


def test_a_run_that_stops_saves_before_it_evaluates() -> None:
    _, seen = run(start=2, stop=lambda minutes: True)
    assert seen == [("step", 3, 9), ("log",), ("save", 3, 6), ("evaluate", 3)]


def test_a_wish_to_stop_is_obeyed_after_the_step() -> None:
    progress, seen = run(stop=lambda minutes: True)
    assert progress.iteration == 1 and seen == [("step", 1, 1), ("log",), ("save", 1, 2)]


@pytest.mark.parametrize(("interval", "expected"), [(None, False), (0, False), (3, True), (4, False)])
def test_due_after_multiples_of_the_interval_only(interval: int | None, expected: bool) -> None:
    assert due(6, interval) is expected
