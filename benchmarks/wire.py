"""What the reduction of gradients hands to torch.distributed, counted where it does."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, param_and_grad_buffer
from torch import Tensor


@dataclass
class Wire:
    """Of one rank."""

    bytes: int = 0
    """A ring of n ranks sends (n - 1)/n of that, an all-reduce twice as much. What an exchange sends to other ranks
    counts n/(n - 1) times, as if a ring had sent it."""
    calls: int = 0


@contextmanager
def counted(chunks: Iterable[DistributedDataParallel]) -> Iterator[Wire]:
    """Inside, count what leaves from within the ``start_grad_sync`` of the chunks' bucket groups."""
    wire, reducing = Wire(), [False]
    groups = [group for chunk in chunks for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]

    def flagged(start: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            reducing[0] = True
            try:
                start(*args, **kwargs)
            finally:
                reducing[0] = False

        return call

    def counting(collective: Any, *, source: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if reducing[0]:
                wire.bytes += args[source].nbytes if collective is not exchange else _exchanged(*args, **kwargs)
                wire.calls += 1
            return collective(*args, **kwargs)

        return call

    exchange = dist.all_to_all_single
    starts = [group.start_grad_sync for group in groups]
    places: list[tuple[Any, str, int]] = [
        (dist, "all_reduce", 0),
        (dist, "reduce_scatter_tensor", 1),
        (dist, "all_to_all_single", 1),
        (param_and_grad_buffer, "dist_reduce_scatter_func", 1),
    ]
    collectives = [getattr(where, name) for where, name, _ in places]
    for group, start in zip(groups, starts, strict=True):
        group.start_grad_sync = flagged(start)
    for (where, name, source), collective in zip(places, collectives, strict=True):
        setattr(where, name, counting(collective, source=source))
    try:
        yield wire
    finally:
        for group, start in zip(groups, starts, strict=True):
            group.start_grad_sync = start
        for (where, name, _), collective in zip(places, collectives, strict=True):
            setattr(where, name, collective)


def _exchanged(_: Tensor, given: Tensor, received: list[int], sent: list[int], *, group: Any, **__: Any) -> int:
    """Bytes of an exchange."""
    del received
    ranks, to_others = group.size(), sum(sent) - sent[group.rank()]
    return to_others * given.element_size() * ranks // (ranks - 1)
