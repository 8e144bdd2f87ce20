"""Sparse steps of a tiny model in any layout, through Megatron's own schedules, and what came of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_sat.distributed import Layout
from megatron_sat.layers.attach import attach_selectors
from megatron_sat.sparsity.controller import Controller, sparse_modules
from megatron_sat.sparsity.schedule import ScheduleConfig, build_schedule
from megatron_sat.sparsity.selector import SelectionConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import (
    SEQ,
    batch,
    layout,
    positions,
    tiny_chunks,
    tiny_config,
    whole_choices,
    whole_gradients,
)

WIDE = {"num_attention_heads": 16, "num_query_groups": 8, "kv_channels": 8}
"""Two query groups on each of four TP ranks, so that one can leave."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A layout, a model, a selection, and how many steps of how many micro-batches it takes."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    virtual_pp: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    """Changes of `tiny_config`, on top of `WIDE`."""
    outside: dict[str, Any] = field(default_factory=dict)
    """Changes of what lies around the layers, for `tiny_chunks`."""
    selection: dict[str, Any] = field(default_factory=dict)
    rate: Fraction = Fraction(1, 2)
    steps: int = 1
    micro_batches: int = 2
    size: int = 2
    """Sequences of a micro-batch, over all replicas."""
    seed: int = 5
    """Of dropout."""


class Outcome(NamedTuple):
    """Of all ranks together."""

    losses: list[float]
    """Of each micro-batch, the mean over its tokens."""
    grads: dict[str, Tensor]
    """By global name, of the last step."""
    choices: list[dict[str, list[int]]]
    """Of each step, by "kind.layer", the units kept."""


def outcome(setup: Setup, prepare: Callable[[], None] = lambda: None) -> Outcome:
    """Run the setup on its ranks and put the pipeline stages together. prepare: called on each rank first."""
    ranks = setup.tp * setup.pp * setup.cp * setup.dp
    found = run_ranks(_take_steps, ranks, setup, prepare)
    losses = [rank.losses for rank in found if rank.losses]
    assert all(rank == losses[0] for rank in losses), "ranks of the last stage must see the same losses"
    choices = [{} for _ in range(setup.steps)]
    grads: dict[str, Tensor] = {}
    for rank in found:
        grads |= rank.grads
        for step, choice in enumerate(rank.choices):
            choices[step] |= choice
    if setup.outside.get("share_embeddings_and_output_weights") and setup.pp > 1:  # the head of the last stage
        grads["embedding.word_embeddings.weight"] += grads.pop("output_layer.weight")
    return Outcome(losses[0], grads, choices)


def attached(chunks: list[Any], *, selection: dict[str, Any], there: Layout, rate: Fraction, steps: int) -> Controller:
    """Selectors on the chunks, and what takes them through steps at one rate."""
    config = SelectionConfig(**selection)
    attach_selectors(chunks, config=config, layout=there)
    schedule = build_schedule(ScheduleConfig(kind="constant", omission_rate=rate, train_iters=steps))
    return Controller(sparse_modules(chunks), schedule=schedule, interval=config.selection_interval)


def _take_steps(_: int, setup: Setup, prepare: Callable[[], None]) -> Outcome:
    prepare()
    there = layout(tp=setup.tp, pp=setup.pp, cp=setup.cp, virtual_pp=setup.virtual_pp)
    chunks = tiny_chunks(tiny_config(**WIDE | setup.model), **setup.outside)
    controller = attached(chunks, selection=setup.selection, there=there, rate=setup.rate, steps=setup.steps)
    losses: list[float] = []
    choices = []
    torch.manual_seed(setup.seed)
    for step in range(1, setup.steps + 1):
        for chunk in chunks:
            chunk.zero_grad()
        with controller.step(step):
            losses += _forward_backward(chunks, setup, there, step)
            choices.append(whole_choices(controller.selectors))
    grads: dict[str, Tensor] = {}
    for chunk in chunks:
        grads |= whole_gradients(chunk)
    for grad in grads.values():
        dist.all_reduce(grad, group=there.dp_cp_group)
        grad /= there.dp_size * there.cp_size
    return Outcome(losses, grads, choices)


def _forward_backward(chunks: list[Any], setup: Setup, there: Layout, step: int) -> list[float]:
    """All micro-batches of a step. Returns their losses on the last stage, nothing elsewhere."""

    def forward_step(iterator: Iterator[tuple[Tensor, ...]], chunk: Any) -> Any:
        tokens, labels, places = next(iterator)
        output = chunk(tokens, places, None, labels=labels)

        def loss_of(losses: Tensor) -> tuple[Tensor, Tensor]:
            loss = losses.mean()
            # the schedule multiplies by the CP size, for losses that are sums over parts of a sequence
            return loss / there.cp_size, loss.detach()

        return output, loss_of

    places = positions(setup.size)
    data = [_part(*batch(10 * step + i, setup.size), places, there=there) for i in range(setup.micro_batches)]
    iterators = [iter(data) for _ in chunks]
    reports: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=setup.micro_batches,
        seq_length=SEQ,
        micro_batch_size=setup.size // there.dp_size,
        forward_only=False,
    )
    for loss in reports:
        dist.all_reduce(loss, group=there.dp_cp_group)
    return [float(loss) / (there.dp_size * there.cp_size) for loss in reports]


def _part(*wholes: Tensor, there: Layout) -> tuple[Tensor, ...]:
    """This replica's sequences, and of each this context-parallel rank's two zigzag chunks."""

    def cut(whole: Tensor) -> Tensor:
        mine = whole.chunk(there.dp_size)[there.dp_rank]
        chunks = mine.chunk(2 * there.cp_size, dim=1)
        return torch.cat([chunks[there.cp_rank], chunks[2 * there.cp_size - 1 - there.cp_rank]], dim=1)

    return tuple(cut(whole) for whole in wholes)
