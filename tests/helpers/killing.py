"""A job of several ranks, of which one is killed: what a launcher starts, and what is left when it ends the others.

Ranks are forked from the process that has imported everything, as in `ranks`; each runs the program as a launcher
would. When one of them is gone the others get a moment to notice, and then go too.
"""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

GRACE_SECONDS = 2.0
"""What the other ranks get to notice a loss."""


class Job:
    """Running ranks."""

    def __init__(self, pids: list[int], *, log: Path) -> None:
        self.pids, self._log = pids, log
        self._codes: dict[int, int] = {}

    def running(self) -> list[int]:
        """Ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self._codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self._codes]

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        if rank in self.running():
            os.kill(self.pids[rank], number)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes, once all have ended. When one failed the others get their grace, and are killed."""
        end = time.monotonic() + seconds
        while self.running():
            if any(self._codes.values()) and end > time.monotonic() + GRACE_SECONDS:
                end = time.monotonic() + GRACE_SECONDS
            if time.monotonic() > end:
                for rank in self.running():
                    self.kill(rank)
            time.sleep(0.005)
        return [self._codes[rank] for rank in range(len(self.pids))]

    def said(self) -> str:
        """Everything that the ranks wrote."""
        return self._log.read_text(errors="replace")


@contextmanager
def job(program: Callable[[list[str]], int], argv: list[str], *, ranks: int) -> Iterator[Job]:
    """Start ``program(argv)`` on so many ranks; none of them outlives the block."""
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                _rank(program, argv, rank=rank, size=ranks, folder=Path(folder))
            pids.append(pid)
        started = Job(pids, log=Path(folder) / "log")
        try:
            yield started
        finally:
            for rank in started.running():
                started.kill(rank)
            started.wait(10)


def _rank(program: Callable[[list[str]], int], argv: list[str], *, rank: int, size: int, folder: Path) -> None:
    code = 1
    try:
        output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))  # pytest's own hide them
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
        code = program(argv)
    except BaseException:  # noqa: BLE001  a forked test must never go on as its parent
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def wait_for(event: Callable[[], bool], *, job: Job, seconds: float) -> bool:
    """Whether it came to pass before the job ended or the time did."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(job.running()) == len(job.pids):
        if event():
            return True
        time.sleep(0.001)
    return False


def a_moment(chance: random.Random, *, up_to: float) -> None:
    """Sleep for a random while."""
    time.sleep(chance.uniform(0.0, up_to))
