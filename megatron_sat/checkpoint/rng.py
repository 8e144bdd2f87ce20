"""Random states in a checkpoint: torch's generator, the device's, and megatron.core's tracker, as tensors.

A state belongs to a place in the pipeline x tensor grid; replicas share it. States are [pp, tp, n] bytes, one
tensor a generator, so they load only into a grid of the same size and on a device of the same kind. They
matter to dropout alone: everything of ours draws from generators seeded by what a checkpoint says anyway.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_sat.distributed import Layout

PREFIX = "sat_rng."


def gather() -> dict[str, Tensor]:
    """The states of this rank by name, each [n] uint8 on the CPU."""
    states = {"torch": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state.get_state() if isinstance(state, torch.Generator) else state
    return {PREFIX + name: state.cpu() for name, state in states.items()}


def restore(states: Mapping[str, Tensor]) -> None:
    """Put back what `gather` gave."""
    torch.set_rng_state(states[f"{PREFIX}torch"])
    torch.cuda.set_rng_state(states[f"{PREFIX}device"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    present = tracker.get_states()
    for name, state in present.items():
        saved = states[f"{PREFIX}tracker.{name}"]
        if isinstance(state, torch.Generator):  # a tracker made for CUDA graphs keeps generators, not states
            state.set_state(saved)
        else:
            present[name] = saved
    tracker.set_states(present)


def describe(states: Mapping[str, Tensor], *, layout: Layout) -> dict[str, ShardedTensor]:
    """The states as one [pp, tp, n] tensor a name, of which this rank has one row."""
    replica = layout.dp_rank * layout.cp_size + layout.cp_rank
    return {
        name: ShardedTensor.from_rank_offsets(
            name,
            state,
            (0, layout.pp_rank, layout.pp_size),
            (1, layout.tp_rank, layout.tp_size),
            replica_id=replica,
            prepend_axis_num=2,
        )
        for name, state in states.items()
    }


def fits(states: Mapping[str, Tensor], *, saved: Mapping[str, Any], layout: Layout) -> bool:
    """Whether a checkpoint has exactly these states for exactly this grid. saved: shapes by key."""
    theirs = {name for name in saved if name.startswith(PREFIX)}
    grid = (layout.pp_size, layout.tp_size)
    return theirs == set(states) and all(tuple(saved[name]) == (*grid, state.numel()) for name, state in states.items())
