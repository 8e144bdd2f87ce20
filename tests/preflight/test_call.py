"""The roll call among gloo ranks: injected differences, a silent rank, a network that does not carry."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sat.preflight import call
from megatron_sat.preflight.call import NoAnswer, Place, hosts_of, roll_call, try_network
from tests.helpers.ranks import run_ranks


def place_of(rank: int, *, size: int, a_host: int = 2) -> Place:
    return Place(rank=rank, world_size=size, local_world_size=a_host, host=f"host{rank // a_host}")


def report(
    rank: int,
    folder: str,
    changed: dict[int, dict[str, str]],
    silent: tuple[int, ...] = (),
    clocks: dict[int, float] | None = None,
    seconds: float = 20.0,
) -> str:
    """What a rank of a roll call hears; "" if all is well."""
    size = dist.get_world_size()
    store = dist.FileStore(f"{folder}/store", size)
    if rank in silent:
        return "silent"
    facts = {"torch": "2.14", "--lr": "0.1"} | changed.get(rank, {})
    off = (clocks or {}).get(rank, 0.0)
    call.GRACE_SECONDS, call.FAREWELL_SECONDS = 1.0, 1.0
    try:
        roll_call(
            store,
            place=place_of(rank, size=size),
            facts=facts,
            timeout_seconds=seconds,
            clock=lambda: time.time() + off,
        )
    except (ValueError, NoAnswer) as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


def test_ranks_that_are_alike_go_on(tmp_path: Path) -> None:
    assert run_ranks(report, 4, str(tmp_path), {}) == [""] * 4


def test_all_ranks_hear_of_a_mixture(tmp_path: Path) -> None:
    heard = run_ranks(report, 4, str(tmp_path), {3: {"torch": "2.13"}})
    way_out = "use one installation on all hosts, of one kind"
    line = f"torch must be the same on all ranks, it is 2.14 on most and 2.13 on rank 3 (host1); {way_out}"
    assert heard == [f"ValueError: {line}"] * 4


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    other = {f"--key-{number}": "1" for number in range(20)}
    heard = run_ranks(report, 2, str(tmp_path), {1: other})
    assert heard[0].endswith("(and 12 more)") and heard[0].count(" | ") == 7


def test_a_wrong_clock_is_a_mixture(tmp_path: Path) -> None:
    heard = run_ranks(report, 3, str(tmp_path), {}, clocks={1: 3600.0})
    for line in heard:
        assert line.startswith("ValueError: clocks must agree within 30 s, rank 1 (host0) is off by up to +3")


def test_a_silent_rank_is_named_with_its_host(tmp_path: Path) -> None:
    heard = run_ranks(report, 4, str(tmp_path), {}, silent=(3,), seconds=1.0)
    line = "all ranks must report within --preflight-timeout (1 s), rank 3 (host1) did not"
    assert heard[3] == "silent"
    for each in heard[:3]:
        assert each == f"NoAnswer: {line}; look at what is running there, and at its log"


def test_where_rank_0_is_silent_the_others_say_so(tmp_path: Path) -> None:
    heard = run_ranks(report, 2, str(tmp_path), {}, silent=(0,), seconds=0.5)
    assert heard[1].startswith("NoAnswer: rank 0 must answer within --preflight-timeout (0.5 s), it does not")


def half_way(rank: int, folder: str) -> str:
    """Rank 1 reports and then never says its clock."""
    call.FAREWELL_SECONDS = 0.2
    store = dist.FileStore(f"{folder}/store", 2)
    if rank == 1:
        store.set("here/1", '{"host": "host0", "facts": {}}')
        return ""
    try:
        roll_call(store, place=place_of(rank, size=2), facts={}, timeout_seconds=1.0)
    except NoAnswer as problem:
        return str(problem)
    return ""


def test_a_rank_that_stops_half_way_is_named(tmp_path: Path) -> None:
    assert "rank 1 (host0) did not" in run_ranks(half_way, 2, str(tmp_path))[0]


def test_a_host_without_any_word_is_named_by_its_number() -> None:
    said = {0: {"host": "a"}, 3: {"host": "b"}}
    silent = "host number 2, which is silent as a whole"
    assert hosts_of(said, place=place_of(0, size=5)) == ["a", "a", "b", "b", silent]


# -- the network


def sums(rank: int, folder: str, absent: int | None) -> str:
    size = dist.get_world_size()
    store = dist.FileStore(f"{folder}/store", size)
    store.set(f"here/{rank}", json.dumps({"host": f"host{rank // 2}"}))
    if rank == absent:
        time.sleep(3.0)
        dist.destroy_process_group()
        return "absent"
    try:
        try_network(store, place=place_of(rank, size=size), device=torch.device("cpu"), timeout_seconds=1.0)
    except NoAnswer as problem:
        dist.destroy_process_group()
        return str(problem)
    return ""


def test_a_sum_over_all_ranks_ends(tmp_path: Path) -> None:
    assert run_ranks(sums, 3, str(tmp_path), None) == [""] * 3


def test_a_rank_that_takes_no_part_in_the_sum_is_named(tmp_path: Path) -> None:
    heard = run_ranks(sums, 3, str(tmp_path), 2)
    assert heard[2] == "absent"
    for line in heard[:2]:
        assert line.startswith(
            "all ranks must take part in a first sum within --preflight-timeout (1 s), rank 2 (host1) did not"
        )


def stuck(rank: int, folder: str, there: bool) -> list[Any]:
    """A collective that never returns: the second thread speaks, and ends the process by what it is handed."""
    store = dist.FileStore(f"{folder}/store", 2)
    store.set(f"here/{rank}", '{"host": "host0"}')
    if rank == 1:
        if there:
            store.set("network/1", "")
        return []
    ended: list[Any] = []
    said: list[str] = []
    call.GRACE_SECONDS = 0.0
    call.sys.stderr.write = said.append  # type: ignore[method-assign]
    call.dist.all_reduce = lambda *_, **__: time.sleep(1.5)  # type: ignore[assignment]
    device, place = torch.device("cpu"), place_of(0, size=2)
    with contextlib.suppress(AssertionError):
        try_network(store, place=place, device=device, timeout_seconds=0.5, end=ended.append)
    return ["".join(said), ended]


@pytest.mark.parametrize(
    ("there", "what"),
    [
        (False, "all ranks must take part in a first sum within --preflight-timeout (0.5 s), rank 1 (host0) did not"),
        (True, "a first sum must end within --preflight-timeout (0.5 s), it did not on rank 0 (host0) although all"),
    ],
)
def test_where_the_sum_hangs_the_process_says_who_is_missing_and_ends(there: bool, what: str, tmp_path: Path) -> None:
    said, ended = run_ranks(stuck, 2, str(tmp_path), there)[0]
    assert said.startswith(f"error: {what}")
    assert ended == [1]


def wrong_sum(_: int, folder: str) -> str:
    store = dist.FileStore(f"{folder}/store", 1)
    place = Place(rank=0, world_size=2, local_world_size=2, host="a")
    try:
        try_network(store, place=place, device=torch.device("cpu"), timeout_seconds=5.0)
    except NoAnswer as problem:
        return str(problem)
    return ""


def test_a_wrong_sum_is_refused(tmp_path: Path) -> None:
    (said,) = run_ranks(wrong_sum, 1, str(tmp_path))
    assert said == "a sum of ones over 2 ranks must be that, got 1.0; check the network"
