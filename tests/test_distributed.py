"""Launch, groups and layout; what a launcher forgot or a layout cannot be is said in one line."""

import fcntl
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_sat.distributed import Launch, in_turn, initialize_model_parallel, join, leave, read_launch
from megatron_sat.turns import TURN
from tests.helpers.ranks import run_ranks

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, Launch(rank=0, world_size=1, local_rank=0)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
            Launch(rank=5, world_size=8, local_rank=1),
        ),
    ],
    ids=["no-launcher", "torchrun"],
)
def test_a_launch_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Launch
) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read_launch() == expected


def test_several_ranks_without_an_address_are_told_to_use_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    launch = Launch(rank=0, world_size=2, local_rank=0)
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE \(2\) needs MASTER_ADDR .* start the ranks with torchrun"):
        join(launch, backend="gloo", timeout_minutes=1)


def alone(_: int) -> list[Any]:
    """A process without a launcher joins a group of its own, twice, and leaves it."""
    dist.destroy_process_group()
    for name in LAUNCHER:
        os.environ.pop(name, None)
    launch = read_launch()
    join(launch, backend="gloo", timeout_minutes=1)
    seen = [dist.get_world_size(), dist.get_backend()]
    join(launch, backend="gloo", timeout_minutes=1)
    leave()
    return [*seen, dist.is_initialized()]


def test_one_process_without_a_launcher_joins_and_leaves() -> None:
    assert run_ranks(alone, 1) == [[1, "gloo", False]]


def with_launcher(rank: int, port: int) -> list[int]:
    """Two ranks meet at the address that a launcher gave them; each is told its GPU where there is one."""
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    devices: list[int] = []
    torch.cuda.is_available = lambda: True
    torch.cuda.set_device = devices.append
    join(read_launch(), backend="gloo", timeout_minutes=1)
    return [dist.get_rank(), dist.get_world_size(), *devices]


def test_ranks_of_a_launcher_meet_each_on_its_gpu(free_port: int) -> None:
    assert run_ranks(with_launcher, 2, free_port) == [[0, 2, 0], [1, 2, 1]]


@pytest.fixture
def free_port() -> int:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store.port


def leaving_without_a_group(_: int) -> bool:
    dist.destroy_process_group()
    leave()
    return dist.is_initialized()


def test_leaving_without_a_group_does_nothing() -> None:
    assert run_ranks(leaving_without_a_group, 1) == [False]


def make(_: int, tp: int, pp: int, cp: int) -> dict[str, Any]:
    """The layout's numbers, and who is in each group."""
    there = initialize_model_parallel(tp=tp, pp=pp, cp=cp, virtual_pp=None, seed=1)
    groups = ("tp_group", "cp_group", "dp_group", "dp_cp_group", "model_group")
    numbers = {name: value for name, value in vars(there).items() if name not in groups}
    return numbers | {name: dist.get_process_group_ranks(getattr(there, name)) for name in groups}


def test_a_layout_says_where_a_rank_stands_and_who_stands_with_it() -> None:
    last = run_ranks(make, 8, 2, 2, 1)[7]
    assert last == {
        "tp_size": 2, "pp_size": 2, "cp_size": 1, "dp_size": 2,
        "tp_rank": 1, "pp_rank": 1, "cp_rank": 0, "dp_rank": 1,
        "tp_group": [6, 7], "cp_group": [7], "dp_group": [5, 7], "dp_cp_group": [5, 7],
        "model_group": [2, 3, 6, 7],
    }  # fmt: skip


def test_context_parallel_ranks_are_among_those_that_share_gradients() -> None:
    ranks = run_ranks(make, 4, 1, 1, 2)
    assert [(rank["cp_group"], rank["dp_group"], rank["dp_cp_group"]) for rank in ranks] == [
        ([0, 1], [0, 2], [0, 1, 2, 3]),
        ([0, 1], [1, 3], [0, 1, 2, 3]),
        ([2, 3], [0, 2], [0, 1, 2, 3]),
        ([2, 3], [1, 3], [0, 1, 2, 3]),
    ]


def test_a_layout_that_does_not_divide_the_ranks_is_refused_with_a_number_that_does() -> None:
    text = r"--tensor-model-parallel-size \(2\) .* must divide the number of ranks \(3\); start a multiple of 2"
    with pytest.raises(RuntimeError, match=f"ValueError: {text}"):
        run_ranks(make, 3, 2, 1, 1)


def twice(_: int) -> bool:
    first, second = (initialize_model_parallel(tp=2, pp=1, cp=1, virtual_pp=None, seed=1).tp_group for _ in range(2))
    return first is second


def test_groups_are_made_once() -> None:
    assert run_ranks(twice, 2) == [True, True]


def draws(_: int, tp: int, pp: int) -> float:
    """A number from the generator that dropout in TP-split layers uses."""
    initialize_model_parallel(tp=tp, pp=pp, cp=1, virtual_pp=None, seed=1)
    with get_cuda_rng_tracker().fork():
        return float(torch.rand(1))


def test_each_tensor_parallel_rank_and_pipeline_stage_draws_for_itself() -> None:
    assert len(set(run_ranks(draws, 2, 2, 1))) == 2
    assert len(set(run_ranks(draws, 2, 1, 2))) == 2


def test_replicas_draw_alike() -> None:
    assert len(set(run_ranks(draws, 2, 1, 1))) == 1


def leaving_in_turn(rank: int, patience: float | None) -> tuple[bool, bool]:
    """Rank 1 leaves at once, rank 0 two seconds later: whether rank 1 waited, and whether it left the group."""
    began = time.monotonic()
    if rank == 0:
        time.sleep(2)
    leave(patience_seconds=patience)
    waited, left = time.monotonic() - began > 1.9, not dist.is_initialized()
    if not left:
        dist.destroy_process_group()
    return waited, left


def test_a_rank_waits_for_the_others_or_for_as_long_as_it_has_patience() -> None:
    assert run_ranks(leaving_in_turn, 2, None)[1] == (True, True)
    assert run_ranks(leaving_in_turn, 2, 30.0)[1] == (True, True)


def giving_up(rank: int) -> tuple[bool, bool]:
    """Rank 0 never comes."""
    if rank == 1:
        return leaving_in_turn(rank, 0.3)
    time.sleep(2)
    dist.destroy_process_group()
    return False, False


def test_a_rank_gives_up_on_others_that_do_not_come() -> None:
    assert run_ranks(giving_up, 2)[1] == (False, False)


def train_in_turn(rank: int, folder: Path) -> list[bool]:
    """Whether the file is another's to take: while this run trains, and afterwards."""

    def is_free() -> bool:
        with (folder / "turn").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    found = []
    with in_turn(Launch(rank=rank, world_size=2, local_rank=rank, turn=folder / "turn")):
        found.append(is_free())
        dist.barrier()
    dist.barrier()
    return [*found, is_free()] if rank == 0 else found


def test_a_run_that_is_told_of_a_file_lets_no_other_train_meanwhile(tmp_path: Path) -> None:
    assert run_ranks(train_in_turn, 2, tmp_path) == [[False, True], [False]]


def test_the_file_of_the_turn_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TURN, str(tmp_path / "turn"))
    assert read_launch().turn == tmp_path / "turn"
    monkeypatch.setenv(TURN, "")
    assert read_launch().turn is None
