"""Times of a run without its first steps' extra."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sat.compare.runs import Run, read_run, steps_that_fit
from megatron_sat.compare.settled import settled
from tests.compare.synthetic import entries, write


def run_of(tmp_path: Path, *, paces: dict[int, float], rates: dict[int, float]) -> Run:
    """100 steps in windows of 10. paces: seconds a step of a window, by its end; rates: from which end on which."""
    lines, elapsed, rate = entries(), 0.0, 0.0
    for line in lines:
        if line["kind"] == "train":
            elapsed += 10 * paces.get(line["step"], 0.5)
            rate = rates.get(line["step"], rate)
            line["nominal_omission_rate"] = rate
        line["elapsed_seconds"] = elapsed
    return read_run(write(tmp_path, lines), name="it")


def test_the_first_window_of_each_rate_takes_what_its_others_take(tmp_path: Path) -> None:
    paces = {10: 3.0, **dict.fromkeys((20, 30, 40, 50), 0.25), 60: 1.5}
    run = run_of(tmp_path, paces=paces, rates={10: 0.5, 60: 0.0})
    found = settled(run)
    assert [window.elapsed_seconds for window in found.windows] == pytest.approx(
        [2.5, 5.0, 7.5, 10.0, 12.5, 17.5, 22.5, 27.5, 32.5, 37.5]
    )
    assert found.seconds == pytest.approx(run.seconds - 27.5 - 10.0)
    times = [point.elapsed_seconds for point in found.windows]
    assert [point.elapsed_seconds for point in found.validations] == times
    assert steps_that_fit(found, seconds=12.5) == 50


def test_a_quick_beginning_and_a_rate_of_one_window_stay_as_they_are(tmp_path: Path) -> None:
    run = run_of(tmp_path, paces={10: 0.1, 100: 4.0}, rates={100: 0.5})
    assert settled(run) == run


def test_a_validation_between_two_records_is_as_much_earlier_as_lies_before_it(tmp_path: Path) -> None:
    run = run_of(tmp_path, paces={10: 1.5}, rates={})
    points = zip(run.validations, (0.0, 7.5, 17.5), strict=False)
    moved = replace(run, validations=tuple(replace(point, elapsed_seconds=time) for point, time in points))
    assert [point.elapsed_seconds for point in settled(moved).validations] == pytest.approx([0.0, 2.5, 7.5])
