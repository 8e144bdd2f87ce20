"""Which steps are bad, and what a guard remembers."""

import json
import math
from typing import Any

import pytest

from megatron_sat.engines.base import StepResult
from megatron_sat.training.guard import ENOUGH, WINDOW, Finding, Guard, GuardConfig


def result(loss: float = 2.0, norm: float = 1.0, *, skipped: bool = False) -> StepResult:
    return StepResult(loss=loss, num_tokens=1, grad_norm=norm, learning_rate=0.1, skipped=skipped)


def seasoned(steps: int = ENOUGH, **config: Any) -> Guard:
    """A guard that saw so many good steps of loss 2 and norm 1."""
    guard = Guard(GuardConfig(**{"max_loss_leap": 2.0, "max_norm_leap": 10.0, **config}))
    for _ in range(steps):
        assert guard.found(result()) is Finding.NONE
        guard.enter(Finding.NONE, result=result())
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "finding"),
    [
        (2.0, 1.0, Finding.NONE),
        (2.0, None, Finding.NONE),
        (math.nan, 1.0, Finding.LOSS_NOT_FINITE),
        (math.inf, None, Finding.LOSS_NOT_FINITE),
        (2.0, math.nan, Finding.NORM_NOT_FINITE),
        (2.0, math.inf, Finding.NORM_NOT_FINITE),
        (4.0, 10.0, Finding.NONE),
        (4.1, 1.0, Finding.LOSS_LEAPT),
        (2.0, 10.1, Finding.NORM_LEAPT),
        (4.1, 10.1, Finding.NORM_LEAPT),
    ],
)
def test_a_step_is_judged_by_its_figures(loss: float, norm: float | None, finding: Finding) -> None:
    guard = seasoned()
    assert guard.judge(loss, norm) is finding
    assert guard.permits(loss, norm) is (finding is Finding.NONE)


def test_a_leap_needs_enough_steps_before_it_and_a_limit() -> None:
    assert seasoned(ENOUGH - 1).judge(100.0, 100.0) is Finding.NONE
    assert seasoned(max_loss_leap=None, max_norm_leap=None).judge(100.0, 100.0) is Finding.NONE


def test_the_yardstick_is_of_the_last_good_steps_alone() -> None:
    guard = seasoned()
    for _ in range(WINDOW):
        guard.enter(Finding.LOSS_LEAPT, result=result(loss=50.0))
        guard.enter(Finding.NONE, result=result(loss=50.0, skipped=True))
    assert guard.judge(4.1, 1.0) is Finding.LOSS_LEAPT
    for _ in range(WINDOW):
        guard.enter(Finding.NONE, result=result(loss=4.0))
    assert guard.judge(4.1, 1.0) is Finding.NONE


def test_what_the_engine_asked_about_is_what_the_step_is_found_to_be() -> None:
    """Its result no longer tells: the norm of a step that was refused is gone."""
    guard = seasoned()
    assert not guard.permits(2.0, 99.0)
    assert guard.found(result(norm=math.nan, skipped=True)) is Finding.NORM_LEAPT
    assert guard.found(result()) is Finding.NONE


def test_an_overflow_of_fp16_is_no_fault_and_a_loss_that_is_no_number_is_one() -> None:
    guard = seasoned()
    assert guard.found(result(norm=math.nan, skipped=True)) is Finding.NONE
    assert guard.found(result(loss=math.nan, norm=math.nan, skipped=True)) is Finding.LOSS_NOT_FINITE


@pytest.mark.parametrize(("policy", "limit", "ends"), [("stop", 5, 1), ("skip", 2, 3), ("rollback", 0, 1)])
def test_a_run_ends_at_the_first_bad_step_or_past_its_limit(policy: str, limit: int, ends: int) -> None:
    guard = seasoned(on_bad_step=policy, max_bad_steps=limit)
    for count in range(1, ends + 1):
        guard.enter(Finding.LOSS_NOT_FINITE, result=result(math.nan))
        assert guard.suspicious
        assert guard.gives_up is (count == ends)
    guard.enter(Finding.NONE, result=result())
    assert not guard.suspicious


def test_a_resumed_guard_judges_as_the_uninterrupted_one() -> None:
    guard = seasoned()
    guard.enter(Finding.LOSS_LEAPT, result=result(9.0))
    again = Guard(guard.config)
    again.restore(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()
    assert again.judge(4.1, 1.0) is Finding.LOSS_LEAPT
    fresh = Guard(guard.config)
    fresh.restore({})
    assert (fresh.bad_steps, fresh.judge(4.1, 1.0)) == (0, Finding.NONE)


@pytest.mark.parametrize(
    ("finding", "said"),
    [
        (Finding.LOSS_NOT_FINITE, "the loss is nan"),
        (Finding.NORM_NOT_FINITE, "norm is not a number, at a loss of"),
        (Finding.LOSS_LEAPT, "above 2.0 times the recent median, 2.0000"),
        (Finding.NORM_LEAPT, "above 10.0 times the recent median, 1.0000"),
    ],
)
def test_a_finding_is_said_in_words(finding: Finding, said: str) -> None:
    assert said in seasoned().explain(finding, loss=math.nan)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"on_bad_step": "pray"}, "--on-bad-step must be one of stop, skip, rollback, got pray"),
        ({"max_bad_steps": -1}, "--max-bad-steps must be at least 0, got -1"),
        ({"max_loss_leap": 1.0}, "--max-loss-leap must be a number above 1, got 1.0"),
        ({"max_norm_leap": math.nan}, "--max-norm-leap must be a number above 1, got nan"),
    ],
)
def test_a_setting_outside_its_range_is_refused_by_its_flag(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GuardConfig(**settings)
