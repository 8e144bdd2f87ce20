"""Figures of a study: by domain and language, over seeds, and when dense's final loss was reached."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sat.compare.runs import read_run
from megatron_sat.compare.study import (
    NEVER,
    Spread,
    figure_names,
    flops_at,
    group_names,
    paired,
    seconds_to,
)
from tests.compare.studies import GIVEN, experiment, group, study
from tests.compare.synthetic import entries, run, write


def test_a_spread_is_mean_and_deviation_of_its_seeds() -> None:
    spread = Spread(values={1: 2.0, 2: 4.0, 3: 9.0})
    assert (spread.mean, spread.min, spread.max) == (5.0, 2.0, 9.0)
    assert spread.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))


@pytest.mark.parametrize("values", [{1: 2.0}, {1: 2.0, 2: math.inf}, {1: math.nan, 2: 1.0}])
def test_a_deviation_needs_two_numbers(values: dict[int, float]) -> None:
    assert math.isnan(Spread(values=values).std)


def test_quality_is_of_domains_and_of_their_languages_mean(tmp_path: Path) -> None:
    made = study(tmp_path)
    changed = {"zh.a": "a", "zh.b": "b", "en": "e"}
    parts = {"train": {"zh": "f"}, "valid": changed, "new": "zh", "old": "en"}
    several = replace(
        made, experiment=experiment(tmp_path, data=parts), tokens_per_character={"zh.a": 0.5, "zh.b": 1.0}
    )
    found = several.quality({"zh.a": 2 * math.log(2), "zh.b": 4 * math.log(2), "en": 1.0})
    assert found == {
        "zh_a_loss": pytest.approx(1.386, abs=1e-3),
        "zh_b_loss": pytest.approx(2.773, abs=1e-3),
        "zh_loss": pytest.approx(3 * math.log(2)),
        "en_loss": 1.0,
        "zh_a_bpc": pytest.approx(1.0),
        "zh_b_bpc": pytest.approx(4.0),
        "zh_bpc": pytest.approx(2.5),
    }


def test_figures_of_a_group_are_of_all_its_seeds(tmp_path: Path) -> None:
    found = study(tmp_path).figures["sat"]
    assert found["zh_loss"].values == {1: 5.2, 2: 5.4}
    assert found["zh_bpc"].values[1] == pytest.approx(5.2 * 0.5 / math.log(2))
    assert "en_bpc" not in found  # nobody counted its text
    assert (found["steps"].mean, found["seconds"].mean, found["peak_memory_gib"].mean) == (100, 40, 1.0)
    assert found["tokens_per_second"].mean == pytest.approx(2048 / 0.4)
    assert found["flops"].mean == 6e10


def test_forgetting_is_what_the_old_language_lost_since_the_start(tmp_path: Path) -> None:
    assert study(tmp_path).figures["sat"]["forgetting_loss"].values == {1: pytest.approx(0.4), 2: pytest.approx(0.4)}


def test_forgetting_of_a_language_with_a_dash_in_its_name_is_found(tmp_path: Path) -> None:
    data = GIVEN["data"] | {"valid": {"zh": "zh.jsonl", "en-gb": "en.jsonl"}, "old": "en-gb"}
    made = study(
        tmp_path,
        experiment=experiment(tmp_path, data=data),
        groups={"dense": group(tmp_path, "dense", {"en": 4.0, "english": "en-gb"})},
        starts={1: {"zh": 9.0, "en-gb": 3.5}},
    )
    assert made.figures["dense"]["forgetting_loss"].values == {1: pytest.approx(0.5)}


def test_every_figure_and_group_that_is_promised_is_there(tmp_path: Path) -> None:
    made = study(tmp_path, tokens_per_character={"zh": 0.5, "en": 0.25})
    assert set(figure_names(made.experiment)) == set(made.figures["sat"])
    assert set(group_names(made.experiment)) == set(made.names) - {"dense_80_steps"}


def test_what_is_left_out_is_not_promised(tmp_path: Path) -> None:
    left_out = ("dense", "dense_equal_time", "rate_0")
    assert group_names(experiment(tmp_path), left_out=left_out) == ["sat"]
    assert "seconds_to_dense" not in figure_names(experiment(tmp_path), left_out=left_out)
    tuned = experiment(tmp_path, program="finetune_sat.py")
    assert not any(name.endswith("_bpc") for name in figure_names(tuned))


def test_without_dense_no_time_to_it_is_known(tmp_path: Path) -> None:
    made = study(tmp_path)
    alone = replace(made, groups={"sat": made.groups["sat"]}, equal_time={}, rate_zero={}, differences={})
    assert "seconds_to_dense" not in alone.figures["sat"]


def test_a_control_is_known_by_its_variant_too(tmp_path: Path) -> None:
    assert study(tmp_path).names["dense_equal_time_sat"] == "dense_80_steps"


def test_commits_of_all_runs_are_known_once(tmp_path: Path) -> None:
    made = study(tmp_path)
    other = group(tmp_path / "more", "sat", {}, {}, commit="def")
    assert replace(made, groups={**made.groups, "sat": other}).commits == ("abc", "def")


def test_a_control_whose_time_is_off_is_noticed(tmp_path: Path) -> None:
    made = study(tmp_path)
    slow = group(tmp_path / "slow", "dense_80_steps", {"steps": 80, "pace": 0.6})
    assert not made.off_time("sat")
    assert replace(made, groups={**made.groups, "dense_80_steps": slow}).off_time("sat")


def test_the_time_to_a_loss_lies_between_two_evaluations(tmp_path: Path) -> None:
    steady = run(tmp_path, "steady", pace=1.0, zh=5.0)  # from 8.6 after 10 s to 5.0 after 100 s
    for goal in (8.6, 7.9, 5.31, 5.0):
        assert seconds_to(steady, goal=goal, domains=["zh"]) == pytest.approx((9 - goal) / 4 * 100)
    assert seconds_to(steady, goal=4.99, domains=["zh"]) == NEVER
    assert seconds_to(steady, goal=8.9, domains=["zh"]) == 10  # nobody looked earlier


def test_dense_reaches_its_own_loss_at_its_end(tmp_path: Path) -> None:
    made = study(tmp_path)
    assert made.figures["dense"]["seconds_to_dense"].mean == pytest.approx(50)
    assert made.figures["sat"]["seconds_to_dense"].mean == NEVER


def test_a_loss_that_was_no_number_before_is_reached_with_the_evaluation(tmp_path: Path) -> None:
    lines = entries(steps=20, pace=1.0)
    lines[1]["loss"]["zh"] = math.inf
    found = read_run(write(tmp_path, lines), name="jump")
    assert seconds_to(found, goal=6.0, domains=["zh"]) == 20


def test_operations_at_a_step_lie_between_two_records(tmp_path: Path) -> None:
    steady = run(tmp_path, "steady", flops=3.0)
    assert [flops_at(steady, step) for step in (0, 5, 10, 17, 100)] == pytest.approx([0, 15, 30, 51, 300])


def test_differences_are_taken_seed_by_seed() -> None:
    one, other = Spread(values={1: 3.0, 2: 5.0}), Spread(values={2: 1.0, 3: 9.0})
    assert paired(one, other).values == {2: 4.0}
    with pytest.raises(ValueError, match=r"must have a seed in common to be compared, they have \[1\] and \[3\]"):
        paired(Spread(values={1: 1.0}), Spread(values={3: 1.0}))
