"""One layer of the program by itself: its micro-batches apart from what a step takes once, with the host and without.

A step of some micro-batches is cut into laps. The first holds choosing and packing, the last holds unpacking; those
between are the layer and nothing else. What the step takes beyond as many of them is what it takes once.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Laps, hold_back
from megatron_sat.build import Run
from megatron_sat.sparsity.controller import Controller, sparse_modules
from megatron_sat.sparsity.schedule import ScheduleConfig, build_schedule

WARM_UP = 2
"""Steps before those that are timed: kernels are chosen and compiled."""
LEAST = 4
"""Micro-batches a step, at least: two laps that neither begin nor end it."""
Layer = Callable[[Tensor], Tensor]
Step = Callable[[int], AbstractContextManager[Any]]
"""(step) -> what its micro-batches lie in."""


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Medians over steps, seconds."""

    layer_seconds: float
    """Forward and backward of a micro-batch, the device's time alone."""
    layer_seconds_launched: float
    """The same when the host launches as it goes."""
    step_seconds: float
    """What a step takes once beside its micro-batches, the device's time alone."""
    step_seconds_launched: float
    host_seconds: float
    """What the host needs to ask for a micro-batch."""


def program_layer(run: Run) -> Layer:
    """The only layer of a built run, as its model calls it. [s, b, h] -> [s, b, h]."""
    (chunk,) = run.engine.chunks
    model: Any = chunk
    (layer,) = model.decoder.layers
    angles = model.rotary_pos_emb(run.config.model.seq_length)

    def forward(x: Tensor) -> Tensor:
        output: Tensor = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)[0]
        return output

    return forward


def steps_at(run: Run, *, rate: Fraction, micro_batches: int | None) -> Step:
    """Steps of the run's modules at one rate. micro_batches: to pack weights for; None: gather."""
    schedule = build_schedule(ScheduleConfig(kind="constant", omission_rate=rate, train_iters=10**6))
    interval = run.config.selection.selection_interval
    controller = Controller(sparse_modules(run.engine.chunks), schedule=schedule, interval=interval)
    return lambda step: controller.step(step, micro_batches=micro_batches)


def clear_gradients(run: Run) -> None:
    """Zero the sums, as the engine does before each step."""
    for chunk in run.engine.chunks:
        for parameter in chunk.parameters():
            held: Any = parameter
            held.main_grad.zero_()
            held.grad_added_to_main_grad = False


def time_layer(
    layer: Layer,
    *,
    inputs: Tensor,
    steps: int,
    micro_batches: int,
    opened: Step = lambda _: nullcontext(),
    before: Callable[[], None] = lambda: None,
) -> LayerTime:
    """Time so many steps with the host and as many without. inputs: in the layer's own order of dimensions.

    before: what happens before a step, outside of its time.
    """
    assert micro_batches >= LEAST, f"{micro_batches} micro-batches have no lap between the first and the last two"
    gradient = torch.randn_like(inputs)
    number, wait = 0, 0.0
    found: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    for held in (False, True):
        for _ in range(WARM_UP + steps):
            number += 1
            before()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            laps = Laps()
            hold_back(wait if held else 0.0)
            clock = time.perf_counter()
            laps.mark()
            with opened(number):
                for _ in range(micro_batches):
                    inputs.grad = None  # as in a model, where nothing is added to a layer's first gradient
                    layer(inputs).backward(gradient)
                    laps.mark()
            laps.mark()
            asked = time.perf_counter() - clock
            seconds = laps.seconds()
            one = statistics.median(seconds[1:-2])
            found[held].append((one, sum(seconds) - micro_batches * one, asked / micro_batches))
            if not held:
                wait = _enough(asked, whole=sum(seconds), micro_batches=micro_batches)
    launched, alone = (_medians(found[held][WARM_UP:]) for held in (False, True))
    return LayerTime(
        layer_seconds=alone[0],
        layer_seconds_launched=launched[0],
        step_seconds=alone[1],
        step_seconds_launched=launched[1],
        host_seconds=alone[2],
    )


def _enough(asked: float, *, whole: float, micro_batches: int) -> float:
    """Seconds to hold a device back, so that it waits for no launch: of a whole step where the host is what takes long,
    of one micro-batch where the host gets ahead by itself. No longer, for a device that rests is a faster one."""
    return 1.2 * (asked if asked > 0.8 * whole else asked / micro_batches)


def _medians(rows: list[tuple[float, float, float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]
