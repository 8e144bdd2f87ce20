"""Time on the device: marks between pieces of work, with the host out of the way where it must be."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

CYCLES_PER_SECOND = 2e9
"""At least as many as a GPU of today makes: holding a device back by a little too much costs nothing but time."""


class Laps:
    """Moments on the device: CUDA events where there is a GPU, else the clock's."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Now, in the order of what was asked of the device."""
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next. Waits for the device."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return [1e-3 * first.elapsed_time(second) for first, second in pairs]
        return [second - first for first, second in pairs]


def hold_back(seconds: float) -> None:
    """Keep a GPU busy that long, so that the host gets ahead and what follows takes the device's time alone."""
    if torch.cuda.is_available() and seconds > 0:
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))


def median_seconds(work: Callable[[], object], *, repeats: int, calls: int = 1) -> float:
    """Of one call on the device: the median of ``repeats`` rounds of ``calls``, after two that are not counted.

    The host asks for a whole round while the device is held back, so launching costs nothing.
    """
    found: list[float] = []
    host = 0.0
    for _ in range(2 + repeats):  # the first warms up, the second tells how long the host takes
        laps = Laps()
        hold_back(2 * host)
        clock = time.perf_counter()
        laps.mark()
        for _ in range(calls):
            work()
        laps.mark()
        host = host or (time.perf_counter() - clock if found else 0.0)
        found.append(laps.seconds()[0] / calls)
    return statistics.median(found[2:])
