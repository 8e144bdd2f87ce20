"""The table and the sentences: who is ahead is said whoever it is, and at equal time."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sat.compare.report import (
    Challenge,
    Comparison,
    bits_per_character,
    columns,
    rows,
    verdicts,
)
from tests.compare.synthetic import comparison, run


def _challenge(tmp_path: Path, **control: Any) -> tuple[Challenge]:
    """SAT beside another control than its own."""
    candidate = comparison(tmp_path).challenges[0].candidate
    replaced = run(tmp_path, "changed", **{"steps": 80, "zh": 5.1, "en": 4.1} | control)
    return (Challenge(candidate=candidate, control=replaced),)


def test_every_run_has_a_row_with_its_losses_and_costs(tmp_path: Path) -> None:
    table = comparison(tmp_path)
    assert columns(table) == [
        "run",
        "zh loss",
        "en loss",
        "zh bits/char",
        "steps",
        "training s",
        "tokens/s",
        "executed FLOPs",
    ]
    assert rows(table) == [
        ["start", "8.0000", "4.5000", "5.771", "", "", "", ""],
        ["dense", "5.0000", "4.0000", "3.607", "100", "50.0", "4,096", "1e+11"],
        ["SAT", "5.2000", "3.9000", "3.751", "100", "40.0", "5,120", "6e+10"],
        ["equal-time", "5.1000", "4.1000", "3.679", "80", "40.0", "4,096", "8e+10"],
    ]


def test_verdicts_say_the_cost_and_who_is_ahead_of_either_dense_run(tmp_path: Path) -> None:
    assert verdicts(comparison(tmp_path)) == [
        (
            "A step of SAT took 20.0% less time than one of dense and executed 40.0% fewer operations (means "
            "over each run): 1.25 times as fast, where 1.67 times would be proportional to the operations."
        ),
        (
            "After 100 steps: on zh dense is ahead of SAT by 0.200 (5.0000 against 5.2000); "
            "on en SAT is ahead of dense by 0.100 (3.9000 against 4.0000)."
        ),
        (
            "At equal training time, 40.0 s of SAT for 100 steps and 40.0 s of equal-time for 80: "
            "on zh equal-time is ahead of SAT by 0.100 (5.1000 against 5.2000); "
            "on en SAT is ahead of equal-time by 0.200 (3.9000 against 4.1000)."
        ),
    ]


def test_a_control_whose_time_is_off_is_not_called_equal(tmp_path: Path) -> None:
    said = verdicts(comparison(tmp_path, challenges=_challenge(tmp_path, pace=0.6)))[2]
    assert said.startswith("At unequal training time (the control took 20.0% more: the machine")


def test_a_control_within_the_tolerance_is_called_equal(tmp_path: Path) -> None:
    said = verdicts(comparison(tmp_path, challenges=_challenge(tmp_path, pace=0.52)))[2]
    assert said.startswith("At equal training time, 40.0 s of SAT for 100 steps and 41.6 s of changed for 80")


def test_losses_that_print_alike_are_level(tmp_path: Path) -> None:
    said = verdicts(comparison(tmp_path, challenges=_challenge(tmp_path, zh=5.20004, en=4.0)))[2]
    assert "on zh they are level (5.2000)" in said
    assert "on en SAT is ahead of changed by 0.100" in said


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_run_that_diverged_is_behind(loss: float, tmp_path: Path) -> None:
    said = verdicts(comparison(tmp_path, challenges=_challenge(tmp_path, zh=loss)))[2]
    assert f"on zh SAT is ahead of changed, which diverged (5.2000 against {loss:.4f}); on en" in said


@pytest.mark.parametrize(("one", "other"), [(math.nan, math.nan), (math.inf, math.inf), (math.nan, math.inf)])
def test_of_two_runs_that_diverged_none_is_ahead(one: float, other: float, tmp_path: Path) -> None:
    (challenge,) = _challenge(tmp_path, zh=other)
    candidate = run(tmp_path, "broken", pace=0.4, zh=one)
    said = verdicts(comparison(tmp_path, challenges=(replace(challenge, candidate=candidate),)))[2]
    assert f"on zh both diverged ({one:.4f} against {other:.4f}); on en" in said


def test_candidates_that_cost_more_are_said_to(tmp_path: Path) -> None:
    slow = run(tmp_path, "slow", pace=0.75, flops=2e9)
    challenge = Challenge(candidate=slow, control=slow)
    said = verdicts(comparison(tmp_path, challenges=(challenge,)))[0]
    assert "took 50.0% more time than one of dense and executed 100.0% more operations" in said


def test_bits_per_character_are_bits_per_token_times_tokens_per_character() -> None:
    # a loss of ln 2 a token is one bit a token; at two tokens a character that makes two bits
    assert bits_per_character(math.log(2), tokens_per_character=2.0) == pytest.approx(2.0)


def test_without_a_start_the_table_has_the_runs_alone(tmp_path: Path) -> None:
    table = replace(comparison(tmp_path), start=None)
    assert [row[0] for row in rows(table)] == ["dense", "SAT", "equal-time"]
    assert rows(table) == rows(comparison(tmp_path))[1:]


def test_a_comparison_without_a_challenge_or_a_domain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a comparison must have a challenge, got none"):
        comparison(tmp_path, challenges=())
    with pytest.raises(ValueError, match="a comparison must have a domain, got none"):
        comparison(tmp_path, domains=())


def test_a_run_that_was_not_validated_on_a_domain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the run 'start' must be validated on law, it has zh, en"):
        comparison(tmp_path, domains=("zh", "law"))


def test_runs_come_reference_first_then_each_candidate_with_its_control(tmp_path: Path) -> None:
    table = comparison(tmp_path)
    twice = Comparison(**vars(table) | {"challenges": table.challenges * 2})
    assert [r.name for r in twice.runs] == ["dense", "SAT", "equal-time", "SAT", "equal-time"]
