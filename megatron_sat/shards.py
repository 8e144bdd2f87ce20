"""Weights that DeepSpeed's ZeRO-3 has left in shards: their shape and, for a moment, their values.

DeepSpeed (0.19) writes on such a parameter what is needed, so nothing of it is imported.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, also while ZeRO-3 has it in shards."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@torch.no_grad()
def whole_weight(parameter: Tensor) -> Tensor:
    """The values of a weight in its shape; where this rank has but a shard, gathered into new memory.

    Collective over the replicas then. DeepSpeed's record of what it has gathered is not touched, so this may be called
    at any time, also while DeepSpeed fetches the same weight ahead.
    """
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    meta: Any = parameter
    group, shard = meta.ds_process_group, meta.ds_tensor.detach().to(parameter.device)
    parts = shard.new_empty(shard.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(parts, shard.contiguous(), group=group)
    return parts[: meta.ds_numel].view(meta.ds_shape)
