"""Requirements: what they mean, and that nothing but their small grammar is understood."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sat.compare.requirement import check, judge
from tests.compare.studies import group, study

GROUPS = ["dense", "sat", "other", "dense_equal_time_sat", "dense_equal_time_other"]
FIGURES = ["zh_loss", "zh_bpc"]


@pytest.mark.parametrize(
    ("text", "left", "right", "holds"),
    [
        ("sat.zh_loss <= dense.zh_loss + 0.26", 5.3, 5.31, True),
        ("sat.zh_loss < dense.zh_loss", 5.3, 5.05, False),
        ("sat.zh_loss > dense.zh_loss", 5.3, 5.05, True),
        ("dense.zh_loss >= sat.zh_loss", 5.05, 5.3, False),
        ("sat.steps == 100", 100, 100, True),
        ("sat.steps != 1e2", 100, 100, False),
        ("sat.zh_loss.max - sat.zh_loss.min <= .3", 0.2, 0.3, True),
        ("sat.zh_loss.std < 1", 0.1414213562, 1, True),
        ("2 + 3 * 4 - 6 / 2 == 11", 11, 11, True),
        ("(2 + 3) * -(4 - 6) == --10", 10, 10, True),
        ("8 / 4 / 2 == 1", 1, 1, True),
        ("sat.zh_loss <= dense_equal_time.zh_loss + 0.2", 5.3, 5.35, True),
        ("sat.zh_loss <= dense_equal_time_sat.zh_loss", 5.3, 5.15, False),
        ("sat.seconds_to_dense <= 50", math.inf, 50, False),
    ],
)
def test_a_requirement_compares_its_two_sides(
    text: str, left: float, right: float, holds: bool, tmp_path: Path
) -> None:
    found = judge(text, study(tmp_path))
    assert [found.left, found.right] == pytest.approx([left, right])
    assert found.holds == holds


def test_both_values_are_said(tmp_path: Path) -> None:
    assert str(judge("sat.zh_loss <= dense.zh_loss", study(tmp_path))) == (
        "sat.zh_loss <= dense.zh_loss: does not hold, 5.3 against 5.05"
    )
    assert "holds, 5.3 against 6" in str(judge("sat.zh_loss <= 6", study(tmp_path)))


@pytest.mark.parametrize("text", ["sat.zh_loss <= dense.zh_loss", "sat.zh_loss != dense.zh_loss", "1 / 0 >= 0"])
def test_what_is_no_number_fulfils_nothing(text: str, tmp_path: Path) -> None:
    made = study(tmp_path)
    diverged = group(tmp_path / "diverged", "sat", {"zh": math.nan, "pace": 0.4}, {"pace": 0.4})
    found = judge(text, replace(made, groups={**made.groups, "sat": diverged}))
    assert not found.holds


def test_a_control_with_another_time_fulfils_nothing(tmp_path: Path) -> None:
    made = study(tmp_path)
    slow = group(tmp_path / "slow", "dense_80_steps", {"steps": 80, "pace": 0.6}, {"steps": 80, "pace": 0.6})
    off = replace(made, groups={**made.groups, "dense_80_steps": slow})
    found = judge("sat.zh_loss <= dense_equal_time.zh_loss + 9", off)
    assert not found.holds
    assert "does not hold, 5.3 against 14, for dense_equal_time_sat did not have the time of sat" in str(found)
    assert judge("sat.zh_loss <= dense.zh_loss + 9", off).holds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fast.zh_loss <= 1", "fast must be a group of this comparison; there are dense, dense_equal_time_other, d"),
        ("sat.en_bpc <= 1", "en_bpc must be a figure of this comparison; there are zh_bpc, zh_loss"),
        ("sat.zh_bpc.median <= 1", "median must be a statistic of this comparison; there are max, mean, min, std"),
        ("zh_bpc <= 1", "a name must be GROUP.FIGURE or GROUP.FIGURE.STATISTIC, got zh_bpc"),
        ("sat.zh_bpc", "one of <= < >= > == != must stand between its sides, got its end"),
        ("1 + 1 <= 2 <= 3", "it must end after its right side, got <="),
        ("sat.zh_bpc <= ", "a number, a name or a parenthesis must stand where its end is"),
        ("(1 <= 2", "a parenthesis must be closed"),
        ("* 1 <= 2", r"a number, a name or a parenthesis must stand where \* is"),
        ("__import__('os') <= 1", r"it may hold names, numbers, \+ - \* / \( \) and a comparison, got \"'os'\) <= 1\""),
        ("sat.zh_bpc = 1", "it may hold names, numbers"),
        ("-" * 51 + "1 <= 2", "at most 50 signs and parentheses may stand within each other"),
        ("dense_equal_time.zh_bpc <= 1", "must be of one variant named beside it, got none; name the control: dense"),
        ("sat.zh_bpc + other.zh_bpc <= dense_equal_time.zh_bpc", "one variant named beside it, got other and sat"),
    ],
)
def test_what_is_no_requirement_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check(text, groups=GROUPS, figures=FIGURES)


def test_a_control_that_was_left_out_cannot_be_required() -> None:
    with pytest.raises(ValueError, match="got none; name the control: it was left out"):
        check("sat.zh_bpc <= dense_equal_time.zh_bpc", groups=["dense", "sat"], figures=FIGURES)


def test_a_figure_that_another_group_alone_has_is_refused(tmp_path: Path) -> None:
    made = study(tmp_path)
    figures = dict(made.figures)
    figures["sat"] = {name: spread for name, spread in figures["sat"].items() if name != "zh_bpc"}
    made.__dict__["figures"] = figures
    with pytest.raises(ValueError, match="sat must have zh_bpc, it has .*; ask for another"):
        judge("sat.zh_bpc <= 1", made)
