"""A run's times without what its first steps took longer: kernels compiled and layers recorded, once a rate.

That is seconds, whatever a run's length. A run of a day does not notice them; in one of a minute that stands for it
they are a tenth.
"""

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from megatron_sat.compare.runs import Point, Run


def settled(run: Run) -> Run:
    """The same run; the first window of each rate at the median pace of the others, if there are any, and all later
    times as much earlier.
    """
    saved = [0.0, *itertools.accumulate(_beyond(run))]
    times = [0.0, *(window.elapsed_seconds for window in run.windows)]

    def earlier(point: Point) -> Point:
        seconds = point.elapsed_seconds
        return replace(point, elapsed_seconds=seconds - float(np.interp(seconds, times, saved)))

    return replace(run, windows=tuple(map(earlier, run.windows)), validations=tuple(map(earlier, run.validations)))


def _beyond(run: Run) -> Iterator[float]:
    """Seconds of each window that the others of its rate do not take."""
    paired = zip(run.windows, run.spans, strict=True)
    for _, same in itertools.groupby(paired, key=lambda pair: pair[0].nominal_omission_rate):
        (steps, seconds), *others = [span for _, span in same]
        pace = statistics.median(s / n for n, s in others) if others else seconds / steps
        yield max(0.0, seconds - steps * pace)
        yield from (0.0 for _ in others)
