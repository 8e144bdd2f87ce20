"""Rates of every step against the paper's formula read literally, rung by rung, and every refusal."""

import math
from decimal import Decimal
from fractions import Fraction
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sat.sparsity.schedule import KINDS, Rung, Schedule, ScheduleConfig, build_schedule, parse_rate
from megatron_sat.sparsity.selection import keep_count

PRE_TRAINING: dict[str, Any] = {
    "kind": "ladder",
    "omission_rate": Fraction(1, 2),
    "start": 2000,
    "rungs": 5,
    "train_iters": 3000,
}
FINE_TUNING: dict[str, Any] = {
    "kind": "ladder",
    "omission_rate": Fraction(24, 25),
    "start": 600,
    "rungs": 1,
    "train_iters": 1200,
}
GIVEN: dict[str, dict[str, Any]] = {
    "none": {},
    "constant": {"omission_rate": Fraction(3, 10)},
    "linear": {"omission_rate": Fraction(3, 10), "start": 40},
    "cosine": {"omission_rate": Fraction(3, 10), "start": 40},
    "ladder": {"omission_rate": Fraction(3, 10), "start": 40, "rungs": 3},
    "mst": {"omission_rate": Fraction(3, 10), "warmup": 30, "restoration": 20, "stages": 2, "interval": 5},
}


def schedule_of(kind: str, **changes) -> Schedule:
    return build_schedule(ScheduleConfig(kind=kind, train_iters=100, **{**GIVEN[kind], **changes}))


def literal_ladder(step: int, *, rate: Fraction, start: int, rungs: int, end: int) -> Fraction:
    """Eq. 11 as printed: look for the l whose interval holds the step."""
    if step <= start:
        return rate
    done, rung = Fraction(step - start, end - start), 1
    while not Fraction(2 ** (rung - 1) - 1, 2**rungs - 1) <= done < Fraction(2**rung - 1, 2**rungs - 1):
        rung += 1
    return max(Fraction(0), rate - rate / rungs * rung)


def rungs_step_by_step(schedule: Schedule) -> list[Rung]:
    """Every step asked, equal neighbours joined."""
    runs = (list(steps) for _, steps in groupby(range(1, schedule.last_step + 1), key=schedule.rate))
    return [Rung(first=run[0], last=run[-1], rate=schedule.rate(run[0])) for run in runs]


def test_the_ladder_of_the_papers_pre_training_has_its_rungs_edge_by_edge():
    schedule = build_schedule(ScheduleConfig(**PRE_TRAINING))

    assert [(rung.first, rung.last, rung.rate) for rung in schedule.rungs()] == [
        (1, 2000, Fraction(5, 10)),
        (2001, 2032, Fraction(4, 10)),
        (2033, 2096, Fraction(3, 10)),
        (2097, 2225, Fraction(2, 10)),
        (2226, 2483, Fraction(1, 10)),
        (2484, 3000, Fraction(0)),
    ]
    assert round(float(schedule.mean_rate()), 3) == 0.361


def test_the_ladder_of_the_papers_fine_tuning_is_dense_in_its_second_half():
    schedule = build_schedule(ScheduleConfig(**FINE_TUNING))

    assert schedule.rungs() == [
        Rung(first=1, last=600, rate=Fraction(96, 100)),
        Rung(first=601, last=1200, rate=Fraction(0)),
    ]
    assert schedule.mean_rate() == Fraction(48, 100)


def test_a_ladder_in_floats_gets_rungs_wrong_where_fractions_are_right():
    schedule = schedule_of("ladder", omission_rate=Fraction(8, 10), rungs=4)
    rung = schedule.rungs()[1]
    in_floats = 0.8 - 0.8 / 4 * 1

    assert rung.rate == Fraction(6, 10)
    assert keep_count(10, rung.rate) == 4
    assert math.floor(10 * (1 - in_floats)) == 3
    assert 0.5 - 0.5 / 5 * 3 != 0.2 == float(build_schedule(ScheduleConfig(**PRE_TRAINING)).rate(2097))


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 120),
    st.integers(0, 120),
    st.integers(1, 12),
    st.fractions(0, Fraction(24, 25), max_denominator=50),
)
def test_any_ladder_is_equation_11_at_every_step(end, start, rungs, rate):
    start = min(start, end)
    config = ScheduleConfig(kind="ladder", omission_rate=rate, start=start, rungs=rungs, train_iters=end)
    schedule = build_schedule(config)

    expected = [literal_ladder(t, rate=rate, start=start, rungs=rungs, end=end) for t in range(1, end + 1)]
    assert [schedule.rate(step) for step in range(1, end + 1)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_rungs_and_mean_of_every_kind_are_those_of_all_steps_one_by_one(kind):
    schedule = schedule_of(kind)

    assert schedule.rungs() == rungs_step_by_step(schedule)
    assert schedule.mean_rate() == sum(schedule.rate(step) for step in range(1, 101)) / 100


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=8))
def test_rungs_of_any_lengths_are_found_exactly(lengths):
    rates = [Fraction(1, 2 + place) for place, length in enumerate(lengths) for _ in range(length)]
    schedule = Schedule(last_step=len(rates), rate_at=lambda step: rates[step - 1])

    assert [rung.steps for rung in schedule.rungs()] == lengths
    assert schedule.rungs() == rungs_step_by_step(schedule)


def test_a_million_steps_of_few_rungs_are_walked_in_few_questions():
    asked = []
    schedule = Schedule(
        last_step=10**6, rate_at=lambda step: asked.append(step) or Fraction(int(step <= 600_000), 2)
    )

    assert [rung.steps for rung in schedule.rungs()] == [600_000, 400_000]
    assert len(asked) < 200


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mst"])
def test_no_schedule_but_msts_ever_rises(kind):
    rates = [schedule_of(kind).rate(step) for step in range(1, 101)]

    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("kind", ["linear", "cosine", "ladder"])
def test_a_descent_holds_its_rate_through_the_start_and_is_exactly_zero_at_the_end(kind):
    schedule = schedule_of(kind)

    assert schedule.rate(40) == Fraction(3, 10)
    assert schedule.rate(41) < Fraction(3, 10)
    assert schedule.rate(100) == 0


def test_the_linear_schedule_is_a_straight_line_in_exact_fractions():
    schedule = schedule_of("linear")

    assert [schedule.rate(step) for step in range(40, 101)] == [
        Fraction(3, 10) * Fraction(100 - t, 60) for t in range(40, 101)
    ]


def test_the_cosine_schedule_follows_the_cosine_to_a_millionth():
    schedule = schedule_of("cosine")

    curve = [0.15 * (1 + math.cos(math.pi * (step - 40) / 60)) for step in range(41, 101)]
    assert [float(schedule.rate(step)) for step in range(41, 101)] == pytest.approx(curve, abs=2e-7)
    assert schedule.rate(70) == Fraction(3, 20)  # half-way, exactly
    assert schedule.rate(55).denominator <= 10**7


@pytest.mark.parametrize("kind", ["linear", "cosine", "ladder"])
def test_a_start_at_the_last_step_never_comes_down(kind):
    assert schedule_of(kind, start=100).rungs() == [Rung(first=1, last=100, rate=Fraction(3, 10))]


def test_a_start_at_zero_puts_the_first_step_on_the_first_rung():
    assert schedule_of("ladder", start=0).rate(1) == Fraction(2, 10)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_rate_zero_is_the_dense_schedule(kind):
    assert schedule_of(kind, omission_rate=Fraction(0)).rungs() == schedule_of("none").rungs()


@pytest.mark.parametrize("step", [0, -1, 101])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(
        ValueError, match=rf"step must be between 1 and 100 \(--train-iters\), got {step}; evaluation"
    ):
        schedule_of("ladder").rate(step)


@pytest.mark.parametrize("written", ["0.96", " 24/25 ", "9.6e-1", 0.96, Decimal("0.96"), Fraction(24, 25)])
def test_a_rate_is_read_exactly_as_it_was_written(written):
    assert parse_rate(written) == Fraction(24, 25)
    assert Fraction(0.96) != Fraction(24, 25)  # what a float is when it is not read as it prints


@pytest.mark.parametrize(
    "written", ["half", "", "1/0", "nan", float("nan"), float("inf"), "0,5", None, [0.5]]
)
def test_what_is_no_number_is_refused_as_a_rate(written):
    with pytest.raises(ValueError, match=r"--sat-omission-rate must be a number such as 0.5 or 1/2, got"):
        parse_rate(written)


@pytest.mark.parametrize("rate", [1, "1.0", -0.25, "50"])
def test_a_rate_outside_zero_to_one_is_refused(rate):
    with pytest.raises(
        ValueError, match=r"--sat-omission-rate must be in \[0, 1\), got (1|-0.25|50); it is the share"
    ):
        parse_rate(rate)
    with pytest.raises(ValueError, match=r"--sat-omission-rate must be in \[0, 1\)"):
        schedule_of("constant", omission_rate=Fraction(rate))


def test_a_float_is_refused_in_the_config_and_the_way_out_is_named():
    with pytest.raises(ValueError, match=r"must be an exact Fraction, got 0.3; use parse_rate\(0.3\)"):
        schedule_of("constant", omission_rate=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 101}, r"--sat-schedule-start must be between 0 and --train-iters \(100\), got 101"),
        ({"start": -1}, r"--sat-schedule-start must be between 0 and --train-iters \(100\), got -1"),
        ({"rungs": 0}, r"--sat-rungs must be at least 1, got 0"),
    ],
)
def test_a_ladder_that_cannot_stand_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        schedule_of("ladder", **changes)


def test_an_unknown_kind_and_a_run_without_steps_are_refused():
    with pytest.raises(
        ValueError, match="--sat-schedule must be one of none, constant, linear, cosine, ladder, mst, got 'step'"
    ):
        ScheduleConfig(kind="step", train_iters=10)
    with pytest.raises(ValueError, match="--train-iters must be at least 1, got 0"):
        ScheduleConfig(kind="none", train_iters=0)


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind in KINDS for field in GIVEN[kind]])
def test_a_field_that_a_kind_reads_must_be_given(kind, field):
    with pytest.raises(
        ValueError, match=rf"--sat-schedule {kind} needs --(sat|mst)-.*, which is not given; add it"
    ):
        schedule_of(kind, **{field: None})


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, f) for kind in KINDS for f in GIVEN["ladder"] if f not in GIVEN[kind]]
)
def test_a_field_that_a_kind_does_not_read_is_refused(kind, field):
    with pytest.raises(
        ValueError, match=rf"--sat-.* has no effect with --sat-schedule {kind}, got .*; drop it or choose one"
    ):
        schedule_of(kind, **{field: GIVEN["ladder"][field]})


def test_none_may_say_rate_zero_for_it_means_the_same():
    assert schedule_of("none", omission_rate=Fraction(0)).mean_rate() == 0
