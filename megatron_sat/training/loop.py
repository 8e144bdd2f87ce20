"""The loop: steps, and what happens between them. One for every engine, for pre-training and for fine-tuning.

It knows steps, an engine and a controller; everything a run does besides training (logs, evaluation, checkpoints) is
handed in as functions for named moments.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_sat.engines.base import Batch, Engine, StepResult
from megatron_sat.sparsity.controller import Controller


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is; goes through its checkpoints."""

    iteration: int = 0
    """Updates done."""
    consumed_samples: int = 0
    """Samples read so far, of the global order."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How far the loop runs and when it pauses. Intervals in steps; None: never."""

    train_iters: int
    num_micro_batches: int
    """Of each data-parallel rank, in each step."""
    global_batch_size: int
    """Samples a step."""
    log_interval: int | None
    eval_interval: int | None
    save_interval: int | None
    packs: bool = False
    """Whether sparse layers pack their weights once a step (the engine must have gradient buffers)."""
    exit_interval: int | None = None
    """Stop after a step that this divides."""
    exit_duration_minutes: float | None = None
    """Stop after the step in which this has passed since the loop began."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What happens between steps. Each is called on every rank, in the order of this list; but a run that stops saves
    before it evaluates."""

    stepped: Callable[[int, StepResult, float], None]
    """(step, result, seconds) after every update."""
    log: Callable[[], None]
    evaluate: Callable[[int], None]
    """(step): a dense pass over the validation sets."""
    save: Callable[[Progress], None]
    should_stop: Callable[[float], bool]
    """(minutes since the loop began): whether all ranks agree to stop now. Asked after `stepped`."""
    should_save: Callable[[], bool]
    """Whether all ranks agree to save now, beside the interval."""
    begin: Callable[[int], None] = lambda step: None
    """(step): before the forward of each step."""


def due(step: int, interval: int | None) -> bool:
    """Whether something that happens every ``interval`` steps happens after this one."""
    return bool(interval) and step % interval == 0  # type: ignore[operator]


def train(
    engine: Engine,
    controller: Controller,
    *,
    progress: Progress,
    extent: Extent,
    batches: Callable[[int], Iterator[Batch]],
    moments: Moments,
) -> Progress:
    """Train from ``progress`` to the extent's end, or to an exit condition; returns where it stopped.

    batches: (consumed samples) -> this rank's micro-batches from there on. After the last step the run is logged,
    evaluated and saved, each unless that step just was. A run that is at its end already is evaluated alone.
    """
    if progress.iteration >= extent.train_iters:
        moments.evaluate(progress.iteration)
        return progress
    micro_batches = batches(progress.consumed_samples)
    began = time.monotonic()
    while progress.iteration < extent.train_iters:
        step = progress.iteration + 1
        clock = time.perf_counter()
        moments.begin(step)
        with controller.step(step, micro_batches=extent.num_micro_batches if extent.packs else None):
            result = engine.train_step(micro_batches, num_micro_batches=extent.num_micro_batches)
        moments.stepped(step, result, time.perf_counter() - clock)
        progress = replace(
            progress, iteration=step, consumed_samples=progress.consumed_samples + extent.global_batch_size
        )
        last = step == extent.train_iters
        stop = due(step, extent.exit_interval) or moments.should_stop((time.monotonic() - began) / 60)
        save = due(step, extent.save_interval) or last or stop or moments.should_save()
        if due(step, extent.log_interval) or last or stop:
            moments.log()
        if stop:  # whoever asks may not wait for an evaluation
            moments.save(progress)
        if due(step, extent.eval_interval) or last:
            moments.evaluate(step)
        if save and not stop:
            moments.save(progress)
        if stop:
            break
    return progress
