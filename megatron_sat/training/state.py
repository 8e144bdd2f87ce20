"""What a run carries through its checkpoints besides weights and optimizer: where it is, what it chose, what it counted.

The choice, the lagged sums and the visits run along a layer's neurons, so they are described to megatron.core's
distributed checkpoints like weights are and come back cut for another TP size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_sat.distributed import Layout
from megatron_sat.sparsity.selector import Selector


def describe_choices(selectors: Sequence[Selector], *, layout: Layout) -> dict[str, ShardedTensor]:
    """The selectors' state as sharded tensors, keyed ``sat.<kind>.<layer>.<name>``; cut over TP, alike over DP and CP."""
    replica = dist.get_rank(layout.dp_cp_group)
    described = {}
    for selector in selectors:
        for name, tensor in selector.state().items():
            key = _key(selector, name)
            if name in selector.sharded_state:
                described[key] = ShardedTensor.from_rank_offsets(
                    key, tensor, (0, layout.tp_rank, layout.tp_size), replica_id=(0, 0, replica)
                )
            else:
                described[key] = ShardedTensor.from_rank_offsets(key, tensor, replica_id=(0, layout.tp_rank, replica))
    return described


def restore_choices(selectors: Sequence[Selector], *, state: Mapping[str, Tensor]) -> None:
    """Hand each selector what `describe_choices` described, filled from a checkpoint."""
    for selector in selectors:
        selector.load_state({name: state[_key(selector, name)] for name in selector.state()})


def whole_visits(selectors: Sequence[Selector], *, layout: Layout) -> dict[str, np.ndarray]:
    """By "kind.layer", how many steps each unit of the whole layer was kept; collective, complete on global rank 0.

    Gathered over TP and then over the pipeline's stages.
    """
    own = {}
    for selector in selectors:
        shards: list[Any] = [None] * layout.tp_size
        dist.all_gather_object(shards, selector.visits.cpu().numpy(), group=layout.tp_group)
        own[f"{selector.place.kind}.{selector.place.layer}"] = np.concatenate(shards)
    stages: list[Any] = [None] * dist.get_world_size(layout.model_group)
    dist.all_gather_object(stages, own, group=layout.model_group)
    return {name: visits for stage in stages for name, visits in stage.items()}


def _key(selector: Selector, name: str) -> str:
    return f"sat.{selector.place.kind}.{selector.place.layer}.{name}"
