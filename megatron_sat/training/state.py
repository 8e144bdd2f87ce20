"""What a run carries through its checkpoints besides weights and optimizer: its choices, sums and visits.

They run along a layer's neurons, so a checkpoint gets them whole, gathered over TP, and each rank cuts its own part
again, whatever the TP size is then. Replicas that choose alike hold the same; where each chooses for itself
(``--sat-dp-selection local``), the checkpoint has the first one's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sat.distributed import Layout
from megatron_sat.sparsity.selector import Selector


def whole_choices(selectors: Sequence[Selector], *, layout: Layout) -> dict[str, Tensor]:
    """The state of this stage's selectors, ``sat.<kind>.<layer>.<name>``, each of the whole layer; collective."""
    mine = {_key(selector, name): tensor for selector in selectors for name, tensor in selector.state().items()}
    shards = _gathered(mine, group=layout.tp_group)
    along = {_key(selector, name) for selector in selectors for name in selector.sharded_state}
    return {key: torch.cat([shard[key] for shard in shards]) if key in along else mine[key] for key in mine}


def restore_choices(selectors: Sequence[Selector], *, saved: Mapping[str, Tensor], layout: Layout) -> None:
    """Hand each selector its part of what `whole_choices` gave. A layer that is not there starts without a choice.

    Raises ValueError where a layer had another number of units.
    """
    for selector in selectors:
        prefix = _key(selector, "")
        state = {key.removeprefix(prefix): tensor for key, tensor in saved.items() if key.startswith(prefix)}
        for name in selector.sharded_state & set(state):
            state[name] = state[name].tensor_split(layout.tp_size)[layout.tp_rank]
        if state:
            selector.load_state(state)


def whole_visits(selectors: Sequence[Selector], *, layout: Layout) -> dict[str, np.ndarray]:
    """By "kind.layer", how many steps each unit of the model was kept; collective, the same on every rank."""
    mine = {f"{s.place.kind}.{s.place.layer}": s.visits.cpu() for s in selectors}
    shards = _gathered(mine, group=layout.tp_group)
    stage = {name: torch.cat([shard[name] for shard in shards]).numpy() for name in mine}
    return {name: visits for part in _gathered(stage, group=layout.model_group) for name, visits in part.items()}


def _gathered(mine: Any, *, group: dist.ProcessGroup) -> list[Any]:
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _key(selector: Selector, name: str) -> str:
    return f"sat.{selector.place.kind}.{selector.place.layer}.{name}"
