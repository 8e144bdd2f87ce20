"""Process groups: who this rank is, and megatron.core's parallel layout.
 The only room that reads torchrun's environment. It holds no state: after `initialize`, ask
`megatron.core.parallel_state`, or the `Layout` that it returned.
"""

import fcntl
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_sat.turns import TURN


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher told this process. One process without a launcher is rank 0 of 1."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None = None
    """Ranks on this host; None: nobody said, so it is taken to be the only one."""
    turn: Path | None = None
    """What `in_turn` holds."""

    @property
    def ranks_a_host(self) -> int:
        return self.local_world_size or self.world_size

    @property
    def hosts(self) -> int:
        return math.ceil(self.world_size / self.ranks_a_host)


def read_launch() -> Launch:
    """The launch as torchrun, Slurm's srun wrapper or nothing at all describes it in the environment."""
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # DeepSpeed's launcher says the second
    return Launch(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(here) if here else None,
        turn=Path(turn) if (turn := os.environ.get(TURN)) else None,
    )


@contextmanager
def in_turn(launch: Launch) -> Iterator[None]:
    """Wait until no other run trains that was told of the same file, and let none meanwhile; all ranks of the group.

    The lock is the process's: one that is killed holds it no longer.
    """
    if launch.turn is None:
        yield
        return
    with ExitStack() as held:
        if dist.get_rank() == 0:
            launch.turn.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context(launch.turn.open("w")), fcntl.LOCK_EX)
        dist.barrier()
        yield


def open_store(launch: Launch, *, timeout_seconds: float) -> dist.Store:
    """Where the ranks meet before there is a group: the launcher's store, or else one on rank 0. Waits for it alone.

    Raises RuntimeError where it cannot be reached in time, or nobody said where it is.
    """
    if launch.world_size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    _require_address(launch)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        address,
        port,
        launch.world_size,
        is_master=launch.rank == 0 and not agents,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    # an agent keeps its store when it starts its ranks again
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _require_address(launch: Launch) -> None:
    if "MASTER_ADDR" not in os.environ:
        raise RuntimeError(
            f"WORLD_SIZE ({launch.world_size}) needs MASTER_ADDR and MASTER_PORT, MASTER_ADDR is not set; "
            "start the ranks with torchrun"
        )


def join(launch: Launch, *, backend: str, timeout_minutes: int, store: dist.Store | None = None) -> None:
    """Join the default process group, on this rank's GPU where there is one.

    backend: "nccl" or "gloo". store: what `open_store` opened; without it torch opens one.
    Raises RuntimeError when more than one rank has no address to meet at.
    """
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    if store is None and launch.world_size == 1 and "MASTER_ADDR" not in os.environ:
        store = dist.HashStore()
    if store is not None:
        rank, size = launch.rank, launch.world_size
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        return
    _require_address(launch)
    dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """This rank's place and the groups that the rooms above are handed."""

    tp_size: int
    pp_size: int
    cp_size: int
    dp_size: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    """Ranks of one model replica (tp x pp)."""


def initialize_model_parallel(
    *, tp: int, pp: int, cp: int, virtual_pp: int | None, seed: int, timeout_minutes: int = 10
) -> Layout:
    """Cut the world into megatron.core's groups (once), seed its generators, say where this rank stands.

    Raises ValueError where tp x pp x cp does not divide the number of ranks.
    """
    world = dist.get_world_size()
    if world % (tp * pp * cp):
        raise ValueError(
            f"--tensor-model-parallel-size ({tp}) x --pipeline-model-parallel-size ({pp}) x "
            f"--context-parallel-size ({cp}) must divide the number of ranks ({world}); "
            f"start a multiple of {tp * pp * cp} ranks"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=virtual_pp,
            context_parallel_size=cp,
            distributed_timeout_minutes=timeout_minutes,
        )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    return current_layout()


def current_layout() -> Layout:
    """The layout of a process whose model-parallel groups exist."""
    ps = parallel_state
    return Layout(
        tp_size=ps.get_tensor_model_parallel_world_size(),
        pp_size=ps.get_pipeline_model_parallel_world_size(),
        cp_size=ps.get_context_parallel_world_size(),
        dp_size=ps.get_data_parallel_world_size(),
        tp_rank=ps.get_tensor_model_parallel_rank(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        cp_rank=ps.get_context_parallel_rank(),
        dp_rank=ps.get_data_parallel_rank(),
        tp_group=ps.get_tensor_model_parallel_group(),
        cp_group=ps.get_context_parallel_group(),
        dp_group=ps.get_data_parallel_group(),
        dp_cp_group=ps.get_data_parallel_group(with_context_parallel=True),
        model_group=ps.get_model_parallel_group(),
    )


def highest(numbers: Sequence[float], *, device: torch.device) -> list[float]:
    """The highest of each number over all ranks; one small collective."""
    told = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return told.tolist()


def declare_local_rank() -> None:
    """Say LOCAL_RANK in the environment, for a library that insists on reading it there; as `read_launch` takes it."""
    os.environ.setdefault("LOCAL_RANK", "0")


def leave(*, patience_seconds: float | None = None) -> None:
    """Wait for the others and take the process group down; a no-op without one.

    patience_seconds: with it a rank that gives up does not wait for ever. Where the others went on without it, the
    group is left as it is, for the process to end with it.
    """
    if not dist.is_initialized():
        return
    if patience_seconds is None:
        dist.barrier()
    else:
        try:
            dist.barrier(async_op=True).wait(timedelta(seconds=patience_seconds))
        except RuntimeError:
            return
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
