"""MST's three phases: rates against the printed formula, stage by stage, and rungs against every step asked."""

from fractions import Fraction
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sat.sparsity.schedule import Rung, Schedule, ScheduleConfig, build_schedule

GIVEN: dict[str, Any] = {
    "kind": "mst",
    "omission_rate": Fraction(9, 10),
    "train_iters": 100,
    "warmup": 30,
    "restoration": 20,
    "stages": 2,
    "interval": 5,
}


def schedule_of(**changes: Any) -> Schedule:
    return build_schedule(ScheduleConfig(**GIVEN | changes))


def rungs_step_by_step(schedule: Schedule) -> list[Rung]:
    """Every step asked, equal neighbours joined."""
    runs = (list(steps) for _, steps in groupby(range(1, schedule.last_step + 1), key=schedule.rate))
    return [Rung(first=run[0], last=run[-1], rate=schedule.rate(run[0])) for run in runs]


def test_the_phases_rise_in_cubic_stages_stay_and_come_down_as_their_mirror() -> None:
    half = Fraction(9, 10) * (1 - (1 - Fraction(1, 2)) ** 3)
    assert [(rung.first, rung.last, rung.rate) for rung in schedule_of().rungs()] == [
        (1, 15, Fraction(0)),
        (16, 30, half),
        (31, 80, Fraction(9, 10)),
        (81, 90, half),
        (91, 100, Fraction(0)),
    ]


def test_equally_long_phases_are_mirrors_step_by_step() -> None:
    schedule = schedule_of(warmup=40, restoration=40, stages=4)
    assert [schedule.rate(step) for step in range(1, 101)] == [schedule.rate(101 - step) for step in range(1, 101)]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_rungs_are_the_runs_of_equal_rates_and_the_run_ends_dense(data: st.DataObject) -> None:
    interval, stages = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4))
    warmup, restoration = (data.draw(st.integers(interval * stages, interval * stages + 40)) for _ in range(2))
    end = warmup + restoration + data.draw(st.integers(0, 60))
    rate = data.draw(st.sampled_from([Fraction(0), Fraction(1, 2), Fraction(9, 10)]))
    schedule = schedule_of(
        interval=interval, stages=stages, warmup=warmup, restoration=restoration, train_iters=end, omission_rate=rate
    )
    assert schedule.rungs() == rungs_step_by_step(schedule)
    assert schedule.rate(1) == schedule.rate(end) == 0
    changes = [rung.first for rung in schedule.rungs()[1:]]
    assert all((first - 1) % interval == 0 for first in changes), "rates change with the topology alone"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"warmup": None}, "--sat-schedule mst needs --mst-warmup, which is not given; add it"),
        ({"stages": 0}, "--mst-stages must be at least 1, got 0; leave it out"),
        ({"interval": 0}, "--mst-interval must be at least 1, got 0; leave it out"),
        ({"warmup": 9}, r"--mst-warmup must be at least --mst-stages x --mst-interval \(2 x 5\), got 9; no stage"),
        ({"restoration": 9}, r"--mst-restoration must be at least --mst-stages x --mst-interval \(2 x 5\), got 9"),
        ({"warmup": 81}, r"--mst-warmup and --mst-restoration must fit into --train-iters \(100\), got 81 and 20"),
        ({"kind": "constant"}, "--mst-warmup has no effect with --sat-schedule constant, got 30; drop it or choose"),
    ],
)
def test_phases_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        schedule_of(**changes)
