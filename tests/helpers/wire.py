"""What the reduction of gradients hands to torch.distributed, counted where it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer

from megatron_sat.engines.megatron import MegatronEngine


@dataclass
class Wire:
    """Of one rank."""

    bytes: int = 0
    """A ring or an exchange of n ranks sends (n - 1)/n of that, an all-reduce twice as much."""
    calls: int = 0


@contextmanager
def counted(engine: MegatronEngine) -> Iterator[Wire]:
    """Inside, count what leaves from within the bucket groups' ``start_grad_sync``."""
    wire, reducing = Wire(), [False]
    groups = [g for c in engine._wrapped for g in (*c.bucket_groups, *c.expert_parallel_bucket_groups)]
    starts = [group.start_grad_sync for group in groups]

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
                wire.bytes += args[source].nbytes
                wire.calls += 1
            return collective(*args, **kwargs)

        return call

    places: list[tuple[Any, str, int]] = [
        (dist, "all_reduce", 0),
        (dist, "all_to_all_single", 1),
        (param_and_grad_buffer, "dist_reduce_scatter_func", 1),
    ]
    originals = [getattr(where, name) for where, name, _ in places]
    for group, start in zip(groups, starts, strict=True):
        group.start_grad_sync = flagged(start)
    for (where, name, source), original in zip(places, originals, strict=True):
        setattr(where, name, counting(original, source=source))
    try:
        yield wire
    finally:
        for group, start in zip(groups, starts, strict=True):
            group.start_grad_sync = start
        for (where, name, _), original in zip(places, originals, strict=True):
            setattr(where, name, original)
    assert torch.distributed.all_reduce is originals[0]
