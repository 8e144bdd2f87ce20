"""What is asked of a run from outside while it trains: to save, or to save and end.

Two ways in. A signal (``--exit-signal-handler``), as Slurm sends one before it takes the machines away: any rank may
get it, and the program ends with a code by which a scheduler starts the job again. And two files in the folder of
``--save``, for people and scripts: ``save`` and ``stop``, seen by rank 0 and removed once they are obeyed.

A signal only raises a flag here; the step under way is finished. What each rank knows is one number, which the loop's
owner lets all ranks agree on with what they exchange after every step anyway.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType

SAVE_FILE, STOP_FILE = "save", "stop"
LOOK_SECONDS = 5.0
"""Rank 0 looks for the files at most so often: a look costs milliseconds where the folder is far away."""


class Wish(IntEnum):
    """What is asked for; the highest of all ranks' counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2
    """By file: save, and end as a finished run does."""
    REQUEUE = 3
    """By signal: save, and end with the code that asks for another start."""


class Requests:
    """What this rank was asked for since it last looked."""

    def __init__(self, folder: Path | None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """folder: of ``--save`` on rank 0; None elsewhere, and where there is none: no file is looked for."""
        self._folder, self._clock = folder, clock
        self._next_look = clock()
        self._signalled = False

    @contextmanager
    def listening(self, number: signal.Signals | None) -> Iterator[None]:
        """Inside, this signal asks for an end instead of making one; None: no signal does."""
        if number is None:
            yield
            return
        before = signal.signal(number, self._hear)
        try:
            yield
        finally:
            signal.signal(number, before)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True

    def look(self) -> Wish:
        """The wish that this rank knows of; files that express one are gone after it."""
        filed = self._look_for_files()
        return Wish.REQUEUE if self._signalled else filed

    def _look_for_files(self) -> Wish:
        now = self._clock()
        if self._folder is None or now < self._next_look:
            return Wish.NOTHING
        self._next_look = now + LOOK_SECONDS
        found = Wish.NOTHING
        for name, wish in ((SAVE_FILE, Wish.SAVE), (STOP_FILE, Wish.STOP)):
            if _take(self._folder / name):
                found = wish
        return found


def _take(path: Path) -> bool:
    """Whether the file was there; it no longer is."""
    try:
        path.unlink()
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        return False
    return True
