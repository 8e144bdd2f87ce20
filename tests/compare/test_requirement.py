"""Requirements: what they mean, and that nothing but their small grammar is understood."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sat.compare.requirement import check, judge, without_bits
from megatron_sat.compare.study import figure_names
from tests.compare.studies import experiment, group, study

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


def test_seeds_count_that_all_groups_have(tmp_path: Path) -> None:
    """Dense's mean of both seeds is 5.05; the control at rate 0 has the first seed alone, and is dense."""
    made = study(tmp_path)
    found = judge("sat_rate_0.zh_loss == dense.zh_loss", made)
    assert found.holds
    assert str(found) == "sat_rate_0.zh_loss == dense.zh_loss: holds, 5 against 5 (seed 1, which all of them have)"
    assert judge("sat.zh_loss <= dense.zh_loss + 9", made).of == ""
    assert not judge("sat_rate_0.zh_loss.std <= dense.zh_loss.std", made).holds


def test_groups_without_a_seed_in_common_fulfil_nothing(tmp_path: Path) -> None:
    made = study(tmp_path)
    apart = replace(made.groups["sat_rate_0"], trials={7: made.groups["dense"].trials[1]})
    starts = {**made.starts, 7: made.starts[1]}
    groups = {**made.groups, "sat_rate_0": apart}
    found = judge("sat_rate_0.zh_loss <= 9 * dense.zh_loss", replace(made, groups=groups, starts=starts))
    assert not found.holds
    assert str(found).endswith("nan against nan, for sat_rate_0 and dense have no seed in common")


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


@pytest.mark.parametrize("text", ["sat.zh_bpc <= 1", "sat.zh_bpc != dense.zh_bpc", "1 >= -sat.no_bpc.max"])
def test_a_figure_that_a_group_turned_out_to_lack_fulfils_nothing_and_loses_nothing(text: str, tmp_path: Path) -> None:
    """Training is over by then: it must not cost the report."""
    made = study(tmp_path)
    figures = dict(made.figures)
    figures["sat"] = {name: spread for name, spread in figures["sat"].items() if name != "zh_bpc"}
    made.__dict__["figures"] = figures
    found = judge(text, made)
    assert not found.holds
    assert str(found).endswith(f", for sat has no {'no' if 'no_' in text else 'zh'}_bpc")


def test_a_group_that_is_not_there_is_refused_after_training_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fast must be a group of this comparison; there are dense, dense_80_steps"):
        judge("fast.zh_loss <= 1", study(tmp_path))
    with pytest.raises(ValueError, match="median must be a statistic of this comparison; there are max, mean, min"):
        judge("sat.zh_loss.median <= 1", study(tmp_path))


@pytest.mark.parametrize(
    ("domains", "old", "left"),
    [
        ([], "en", ["zh_bpc", "en_bpc", "zh_a_bpc", "zh_b_1_bpc", "forgetting_bpc"]),
        (["zh.b-1"], "en", ["en_bpc", "zh_a_bpc", "forgetting_bpc"]),
        (["en"], "en", ["zh_bpc", "zh_a_bpc", "zh_b_1_bpc"]),
        (["en"], None, ["zh_bpc", "zh_a_bpc", "zh_b_1_bpc", "forgetting_bpc"]),
        (["zh.a", "zh.b-1", "en"], "zh", []),
    ],
)
def test_text_that_nobody_counted_has_no_bits_and_its_language_has_none(
    domains: list[str], old: str | None, left: list[str]
) -> None:
    losses = ["zh_loss", "en_loss", "zh_b_1_loss", "forgetting_loss", "seconds"]
    figures = [*losses, "zh_bpc", "en_bpc", "zh_a_bpc", "zh_b_1_bpc", "forgetting_bpc"]
    assert without_bits(figures, domains=domains, old=old) == [*losses, *left]


@pytest.mark.parametrize("uncounted", [["zh.a"], ["zh.b"], ["en"], ["zh.a", "en"], ["zh.a", "zh.b", "en"], []])
def test_the_bits_that_are_left_are_those_that_a_study_will_have(uncounted: list[str], tmp_path: Path) -> None:
    data = {"train": {"zh": "a"}, "valid": {"zh.a": "a", "zh.b": "b", "en": "c"}, "new": "zh", "old": "en"}
    asked = experiment(tmp_path, data=data)
    promised = without_bits(figure_names(asked), domains=uncounted, old=asked.old)
    counted = {domain: 0.5 for domain in asked.valid if domain not in uncounted}
    made = replace(study(tmp_path), experiment=asked, tokens_per_character=counted)
    had = {name for name in made.quality(dict.fromkeys(asked.valid, 2.0)) if name.endswith("_bpc")}
    assert {name for name in promised if name.endswith("_bpc")} - {"forgetting_bpc"} == had
    assert ("forgetting_bpc" in promised) == ("en_bpc" in had)
