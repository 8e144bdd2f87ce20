"""Is every rank there, is every rank the same, does the network carry? Asked before a run's first collective.

Another version or another copy of the data on one host, a rank that never came: with many hosts one of them is a matter
of time, and left alone it is a hang of half an hour, or a run that nobody can explain. Here each rank says what it is
into the store at which the ranks meet anyway; rank 0 compares, and all end with one sentence that names the odd ranks
and their hosts. Then one number is summed over all ranks, with a time-out of its own.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_sat.preflight.facts import CLOCK_TOLERANCE_SECONDS, Facts, clocks_apart, differences, where

GRACE_SECONDS = 15.0
"""How much longer than rank 0 the others wait for its verdict."""
FAREWELL_SECONDS = 5.0
"""How long rank 0, which may be the store's home, stays at most until the others have heard."""
MOST_LINES = 8
"""Differences that are said; a host with another command line has many."""


class NoAnswer(RuntimeError):
    """A rank that did not come, or a network that does not carry."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which rank this is, and where."""

    rank: int
    world_size: int
    local_world_size: int
    """Ranks on this host; hosts have consecutive ranks."""
    host: str


def roll_call(
    store: dist.Store,
    *,
    place: Place,
    facts: Facts,
    timeout_seconds: float,
    clock: Callable[[], float] = time.time,
) -> None:
    """Every rank says ``facts`` in ``store``, which no preflight used before; all learn whether all is well.

    Needs no process group. Raises ValueError on every rank for a mixture, and NoAnswer where a rank is silent.
    """
    store.set(f"here/{place.rank}", json.dumps({"host": place.host, "facts": dict(facts)}))
    if place.rank == 0:
        verdict = _judge(store, place=place, timeout_seconds=timeout_seconds, clock=clock)
        store.set("verdict", json.dumps(verdict))
    else:
        patience = timedelta(seconds=timeout_seconds + GRACE_SECONDS)
        try:
            store.wait(["go"], patience)
            store.set(f"clock/{place.rank}", repr(clock()))
            store.wait(["verdict"], patience)
        except RuntimeError:
            raise NoAnswer(
                f"rank 0 must answer within --preflight-timeout ({timeout_seconds:g} s), it does not; look at what is "
                "running on the first host, and at its log"
            ) from None
        verdict = json.loads(store.get("verdict"))
    _wait_for_readers(store, place=place)
    if verdict["silent"]:
        raise NoAnswer(verdict["silent"])
    if verdict["mixture"]:
        raise ValueError(verdict["mixture"])


def _judge(store: dist.Store, *, place: Place, timeout_seconds: float, clock: Callable[[], float]) -> dict[str, str]:
    """On rank 0: what is wrong, if anything."""
    world, verdict = range(place.world_size), {"silent": "", "mixture": ""}
    silent = _silent(store, "here", place.world_size, seconds=timeout_seconds)
    said = {rank: json.loads(store.get(f"here/{rank}")) for rank in world if rank not in silent}
    hosts = hosts_of(said, place=place)
    store.set("go", "")
    if silent:
        verdict["silent"] = _silence(silent, hosts=hosts, timeout_seconds=timeout_seconds, what="report")
        return verdict
    store.set("clock/0", repr(clock()))
    late = _silent(store, "clock", place.world_size, seconds=min(timeout_seconds, CLOCK_TOLERANCE_SECONDS))
    if late:
        verdict["silent"] = _silence(late, hosts=hosts, timeout_seconds=timeout_seconds, what="say their clock")
        return verdict
    wrong = differences([said[rank]["facts"] for rank in world], hosts=hosts)
    wrong += clocks_apart([float(store.get(f"clock/{rank}")) for rank in world], hosts=hosts)
    more = f" (and {len(wrong) - MOST_LINES} more)" if len(wrong) > MOST_LINES else ""
    verdict["mixture"] = " | ".join(wrong[:MOST_LINES]) + more
    return verdict


def _silent(store: dist.Store, kind: str, world_size: int, *, seconds: float) -> list[int]:
    """Ranks whose key is not there after so many seconds."""
    waiting, end = list(range(world_size)), time.monotonic() + seconds
    while waiting:
        waiting = [rank for rank in waiting if not store.check([f"{kind}/{rank}"])]
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return waiting


def hosts_of(said: Mapping[int, Mapping[str, Any]], *, place: Place) -> list[str]:
    """By rank; of a silent rank that of its neighbours, where one of them spoke."""
    size, hosts = place.local_world_size, []
    for rank in range(place.world_size):
        block = range(rank // size * size, min((rank // size + 1) * size, place.world_size))
        known = [said[each]["host"] for each in (rank, *block) if each in said]
        hosts.append(known[0] if known else f"host number {rank // size}, which is silent as a whole")
    return hosts


def _silence(ranks: Sequence[int], *, hosts: Sequence[str], timeout_seconds: float, what: str) -> str:
    rule = f"all ranks must {what} within --preflight-timeout ({timeout_seconds:g} s)"
    return f"{rule}, {where(ranks, hosts=hosts)} did not; look at what is running there, and at its log"


def _wait_for_readers(store: dist.Store, *, place: Place) -> None:
    """Nobody goes before rank 0 knows that all have heard, or gives them up."""
    store.set(f"read/{place.rank}", "")
    if place.rank == 0:
        _silent(store, "read", place.world_size, seconds=FAREWELL_SECONDS)


# -- the network


def try_network(
    store: dist.Store,
    *,
    place: Place,
    device: torch.device,
    timeout_seconds: float,
    end: Callable[[int], Any] = os._exit,
) -> None:
    """Sum one number over all ranks of the default group, after a roll call in the same store.

    Raises NoAnswer, naming who did not take part, when that does not end in time. NCCL may not come back from
    making its connections at all: then a second thread says so and ends the process by ``end``.
    """
    store.set(f"network/{place.rank}", "")
    # a connection of its own where stores can be cloned: NCCL may be waiting on the other one
    apart = getattr(store, "clone", lambda: store)()
    stuck = threading.Timer(timeout_seconds + GRACE_SECONDS, _give_up, (apart, place, timeout_seconds, end))
    stuck.daemon = True
    stuck.start()
    try:
        number = torch.ones(1, device=device)
        work = dist.all_reduce(number, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=timeout_seconds))
        total = number.item()
    except RuntimeError as error:
        raise NoAnswer(_who_is_missing(store, place=place, timeout_seconds=timeout_seconds)) from error
    finally:
        stuck.cancel()
    if total != place.world_size:
        raise NoAnswer(f"a sum of ones over {place.world_size} ranks must be that, got {total}; check the network")


def _give_up(store: dist.Store, place: Place, timeout_seconds: float, end: Callable[[int], Any]) -> None:
    sys.stderr.write(f"error: {_who_is_missing(store, place=place, timeout_seconds=timeout_seconds)}\n")
    sys.stderr.flush()
    end(1)


def _who_is_missing(store: dist.Store, *, place: Place, timeout_seconds: float) -> str:
    silent = _silent(store, "network", place.world_size, seconds=0.0)
    unknown = _silent(store, "here", place.world_size, seconds=0.0)
    there = {rank: json.loads(store.get(f"here/{rank}")) for rank in range(place.world_size) if rank not in unknown}
    if silent:
        hosts = hosts_of(there, place=place)
        return _silence(silent, hosts=hosts, timeout_seconds=timeout_seconds, what="take part in a first sum")
    return (
        f"a first sum must end within --preflight-timeout ({timeout_seconds:g} s), it did not on rank {place.rank} "
        f"({place.host}) although all ranks took part; check the network between the hosts (NCCL_DEBUG=INFO, "
        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME)"
    )
