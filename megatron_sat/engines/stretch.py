"""Where the optimizer's copy of a parameter lies on this rank, whoever cut it.

An optimizer may step on the parameter itself, on an fp32 copy of it, or on a flat tensor in which this rank has a
part of it among parts of others: megatron.core's distributed optimizer and DeepSpeed's ZeRO each have their own way.
A `Stretch` says it in one: these elements of that tensor are those elements of the parameter. Nothing here is
imported from DeepSpeed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import DistributedOptimizer, Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Stretch:
    """A part of a parameter that this rank updates."""

    main: Tensor
    """What the torch optimizer has in its parameter groups."""
    offset: int
    """First element of the part in ``main``, flat."""
    start: int
    """First element of the part in the parameter, flat."""
    length: int
    """Elements of the part."""
    shape: torch.Size
    """Of the whole parameter (this rank's TP shard)."""

    def of(self, tensor: Tensor) -> Tensor:
        """The part [length] of ``main``, or of a tensor of its shape: a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]


Find = Callable[[torch.nn.Parameter], Stretch | None]
"""The stretch of a parameter; None where this rank's optimizer has nothing of it."""


def stretches_of_megatron(wrapper: MegatronOptimizer) -> Find:
    """For one of megatron.core's three wrappers of a torch optimizer."""

    def find(parameter: torch.nn.Parameter) -> Stretch | None:
        main: Tensor = parameter
        start = 0
        if isinstance(wrapper, DistributedOptimizer):
            if parameter not in wrapper.model_param_group_index_map:
                return None
            group, order = wrapper.model_param_group_index_map[parameter]
            main = wrapper.optimizer.param_groups[group]["params"][order]
            start = wrapper._get_model_param_range_map(parameter)["param"].start
        elif isinstance(wrapper, Float16OptimizerWithFloat16Params) and parameter.dtype != torch.float32:
            main = parameter.main_param  # type: ignore[attr-defined]
        return Stretch(main=main, offset=0, start=start, length=main.numel(), shape=parameter.shape)

    return find


def stretches_of_deepspeed(optimizer: Any, *, stage: int) -> Find:
    """For the optimizer that ``deepspeed.initialize`` made (0.19): torch's own at stage 0, one of DeepSpeed's above."""
    if stage == 0:
        return _whole
    return _in_zero3(optimizer) if stage == 3 else _in_zero12(optimizer)


def _whole(parameter: torch.nn.Parameter) -> Stretch:
    return Stretch(main=parameter, offset=0, start=0, length=parameter.numel(), shape=parameter.shape)


def _in_zero12(optimizer: Any) -> Find:
    # bf16 with gradients in fp32 at stage 1 is a class of its own, with another name for the same list
    name = "fp32_groups_flat_partition" if hasattr(optimizer, "fp32_groups_flat_partition") else None
    partitions = getattr(optimizer, name or "single_partition_of_fp32_groups")

    def find(parameter: torch.nn.Parameter) -> Stretch | None:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Stretch(
            main=partitions[mapping.param_group_index],
            offset=here.start,
            start=there.start,
            length=here.numel,
            shape=parameter.shape,
        )

    return find


def _in_zero3(optimizer: Any) -> Find:
    def find(parameter: torch.nn.Parameter) -> Stretch | None:
        meta: Any = parameter
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = dist.get_rank(meta.ds_process_group) * size
        length = min(size, meta.ds_numel - start)  # the last ranks' shards are padded, or padding alone
        if length <= 0:
            return None
        main = optimizer.fp32_partitioned_groups_flat[group]
        return Stretch(main=main, offset=int(offset), start=start, length=length, shape=meta.ds_shape)

    return find
