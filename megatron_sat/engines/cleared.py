"""Entries of weights that are zero from now on, in every copy that an update would read: model, master weight, moments.

A weight that is zero in the model alone comes back with the next update, from the optimizer's fp32 copy of it; one that
is zero there too is moved by its momentum. With all of them zero, and a gradient of zero, an entry stays as it is under
Adam, decay included. Where the optimizer has its copy, whole or in part, `stretch` says.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_sat.engines.frozen import state_of
from megatron_sat.engines.stretch import stretches_of_megatron

Cleared = tuple[Parameter, Tensor]
"""(parameter, bool of its shape on this rank): the entries that are to be zero."""


@torch.no_grad()
def clear_entries(optimizer: MegatronOptimizer, *, entries: Iterable[Cleared]) -> None:
    """Set weights, master weights and moments of these entries to zero, where this rank has them.

    All replicas must name the same ones. Between two steps, or between a backward and its update.
    """
    inner = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    working = [wrapper for wrapper in inner if not getattr(wrapper, "is_stub_optimizer", False)]
    steps_on = {id(wrapper): _own(wrapper) for wrapper in working}
    for parameter, where in entries:
        parameter.data.masked_fill_(where, 0)
        for wrapper in working:
            stretch = stretches_of_megatron(wrapper)(parameter)
            if stretch is None or id(stretch.main) not in steps_on[id(wrapper)]:
                continue
            part = where.flatten()[stretch.start : stretch.start + stretch.length]
            for tensor in (stretch.main, *state_of(wrapper.optimizer, stretch.main).values()):
                stretch.of(tensor).masked_fill_(part.to(tensor.device), 0)


def _own(wrapper: MegatronOptimizer) -> set[int]:
    return {id(main) for group in wrapper.optimizer.param_groups for main in group["params"]}


@torch.no_grad()
def gather_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Make the reduced gradient of every parameter whole on every replica; collective.

    A distributed optimizer leaves each replica the sums of its own shard; nothing reads what else is in the buffer, so
    the others' shards take its place. Without one there is nothing to do.
    """
    for chunk in chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for group in chunk.bucket_groups:
            ranks: dist.ProcessGroup = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)
