"""Dense training after other operations: between two finished runs, and silence where there are none."""

from pathlib import Path

import pytest

from megatron_sat.compare.operations import at_equal_operations, dense_at, dense_groups
from megatron_sat.compare.study import Study
from tests.compare.studies import experiment, group, study


def known(folder: Path) -> Study:
    """Dense runs of 40, 80 and 100 steps; SAT did as many operations as dense does in 60."""
    made = study(folder)
    short = group(folder, "dense_40_steps", *(2 * [{"zh": 6.1, "en": 5.0, "steps": 40}]))
    return Study(**{**vars(made), "groups": {**made.groups, short.name: short}})


def test_dense_groups_are_known_by_their_steps(tmp_path: Path) -> None:
    assert dense_groups(known(tmp_path)) == ["dense_40_steps", "dense_80_steps", "dense"]


def test_between_two_dense_runs_the_line_is_straight(tmp_path: Path) -> None:
    made = known(tmp_path)
    assert made.figures["sat"]["flops"].mean == 6e10
    found = dense_at(made, figure="zh_loss", flops=6e10)
    assert found is not None
    loss, around = found
    assert loss == pytest.approx((6.1 + 5.15) / 2)
    assert around == (40, 80)
    assert dense_at(made, figure="zh_loss", flops=8e10) == (pytest.approx(5.15), (40, 80))
    assert dense_at(made, figure="zh_loss", flops=3.9e10) is None
    assert dense_at(made, figure="zh_loss", flops=10.1e10) is None


def test_a_sentence_for_each_language_and_none_outside(tmp_path: Path) -> None:
    said = at_equal_operations(known(tmp_path), "sat")
    assert [line.split(":")[0] for line in said] == 2 * ["At equal operations, between dense runs of 40 and 80 steps"]
    assert said[1].endswith("en_loss of sat 3.9000, of dense 4.5500.")
    assert at_equal_operations(study(tmp_path / "other"), "sat") == []


@pytest.mark.parametrize("given", [[100], [50, 50], [0], ["50"], 50, [True]])
def test_lengths_that_are_none_or_all_runs_own_are_refused(given: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"budget: dense_steps must be different numbers of steps, none of them that"):
        experiment(tmp_path, budget={"steps": 100, "dense_steps": given})
