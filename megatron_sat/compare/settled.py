"""A run's times without what its first steps took longer: kernels compiled and layers recorded, once a rate.

That is seconds, whatever a run's length. A run of a day does not notice them; in one of a minute that stands for it
they are a tenth.
"""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_sat.compare.runs import Run, Window


def settled(run: Run) -> Run:
    """The same run; the first window of each rate at the median pace of the others, if there are any, and all later
    times as much earlier.
    """
    saved = [0.0, *itertools.accumulate(_beyond(run.windows))]
    times = [0.0, *(window.elapsed_seconds for window in run.windows)]
    ends = zip(run.windows, times[1:], saved[1:], strict=True)
    windows = [replace(window, elapsed_seconds=end - less) for window, end, less in ends]

    def earlier(seconds: float) -> float:
        after = min(next((n for n, t in enumerate(times) if t >= seconds), len(times) - 1), len(times) - 1)
        if after == 0 or seconds >= times[-1]:
            return seconds - saved[after]
        share = (seconds - times[after - 1]) / (times[after] - times[after - 1])
        return seconds - saved[after - 1] - share * (saved[after] - saved[after - 1])

    validations = [replace(point, elapsed_seconds=earlier(point.elapsed_seconds)) for point in run.validations]
    return replace(run, windows=tuple(windows), validations=tuple(validations))


def _beyond(windows: Sequence[Window]) -> Iterator[float]:
    """Seconds of each window that the others of its rate do not take."""
    ends = [(0, 0.0), *((window.step, window.elapsed_seconds) for window in windows)]
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends)]
    paired = zip(windows, spans, strict=True)
    for _, same in itertools.groupby(paired, key=lambda pair: pair[0].nominal_omission_rate):
        (steps, seconds), *others = [span for _, span in same]
        pace = statistics.median(s / n for n, s in others) if others else seconds / steps
        yield max(0.0, seconds - steps * pace)
        yield from (0.0 for _ in others)
