"""Joining the process group of a run, after a preflight where one is wanted: by default on more than one host."""

import socket
import sys
import time

import torch
import torch.distributed as dist

from megatron_sat import distributed, log
from megatron_sat.cli import USAGE_ERROR
from megatron_sat.config import Config
from megatron_sat.distributed import Launch
from megatron_sat.preflight.call import NoAnswer, Place, roll_call, try_network
from megatron_sat.preflight.facts import facts_of

NO_ANSWER = 5
"""What the process exits with where a rank did not come."""


def join(config: Config, launch: Launch, *, cuda: bool) -> int:
    """Join the default process group. Returns 0, or the code to exit with, one line on stderr of each host."""
    parallel = config.parallel
    wanted = launch.hosts > 1 if parallel.preflight is None else parallel.preflight
    if not wanted:
        distributed.join(launch, backend=parallel.backend, timeout_minutes=parallel.timeout_minutes)
        return 0
    try:
        _join_after_a_look(config, launch, cuda=cuda)
    except (ValueError, NoAnswer) as problem:
        if launch.local_rank == 0:
            sys.stderr.write(f"error: {problem}\n")
        return NO_ANSWER if isinstance(problem, NoAnswer) else USAGE_ERROR
    return 0


def _join_after_a_look(config: Config, launch: Launch, *, cuda: bool) -> None:
    """Raises ValueError on all ranks where they are a mixture, `NoAnswer` where one is silent or the network is."""
    parallel = config.parallel
    began, seconds = time.monotonic(), parallel.preflight_timeout
    try:
        opened = distributed.open_store(launch, timeout_seconds=seconds)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise NoAnswer(f"rank {launch.rank} must reach the first host within --preflight-timeout: {reason}") from error
    store = dist.PrefixStore("preflight", opened)
    place = Place(
        rank=launch.rank,
        world_size=launch.world_size,
        local_world_size=launch.ranks_a_host,
        host=socket.gethostname(),
    )
    if cuda:
        torch.cuda.set_device(launch.local_rank)
    roll_call(store, place=place, facts=facts_of(config, cuda=cuda), timeout_seconds=seconds)
    distributed.join(launch, backend=parallel.backend, timeout_minutes=parallel.timeout_minutes, store=opened)
    device = torch.device("cuda", launch.local_rank) if cuda else torch.device("cpu")
    try_network(store, place=place, device=device, timeout_seconds=seconds)
    who = f"{launch.world_size} ranks on {launch.hosts} host(s)"
    log.say(f"preflight: {who} are there and alike, and reach each other ({time.monotonic() - began:.1f} s)")
