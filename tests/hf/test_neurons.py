"""Heads in three weights against a label for every row, and against Megatron's fused layout."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_sat.hf.neurons import SplitHeads
from megatron_sat.sparsity.neurons import Heads
from tests.helpers.reference import QkvRow, label_qkv, literal_head_scores
from tests.helpers.tolerances import FP32_SUMS

SIZES = {"groups": 3, "heads_per_group": 2, "head_dim": 4}


def labels() -> list[QkvRow]:
    """Every row of Q, then of K, then of V, by what it belongs to."""
    fused = label_qkv(**SIZES)
    return [row for part in "qkv" for row in fused if row.part == part]


def belongs(row: QkvRow, units: list[int], *, whole_groups: bool) -> bool:
    unit = row.group if whole_groups else row.group * SIZES["heads_per_group"] + row.head
    return unit in units and (whole_groups or row.part == "q")


CASES = [(True, [0, 2]), (True, [1]), (False, [0, 3, 4]), (False, [1, 2, 5])]


@pytest.mark.parametrize(("whole_groups", "units"), CASES)
def test_rows_are_those_of_the_units_alone(whole_groups: bool, units: list[int]) -> None:
    neurons = SplitHeads(**SIZES, whole_groups=whole_groups)
    wanted = [n for n, row in enumerate(labels()) if belongs(row, units, whole_groups=whole_groups)]
    assert neurons.rows(torch.tensor(units)).tolist() == wanted


@pytest.mark.parametrize(("whole_groups", "units"), CASES)
def test_kept_rows_have_the_shared_keys_and_values_too(whole_groups: bool, units: list[int]) -> None:
    neurons = SplitHeads(**SIZES, whole_groups=whole_groups)
    shared = [] if whole_groups else [n for n, row in enumerate(labels()) if row.part != "q"]
    wanted = [n for n, row in enumerate(labels()) if belongs(row, units, whole_groups=whole_groups)]
    assert neurons.kept_rows(torch.tensor(units)).tolist() == sorted({*wanted, *shared})


@pytest.mark.parametrize(("whole_groups", "units"), CASES)
def test_rows_of_each_count_from_the_beginning_of_their_weight(whole_groups: bool, units: list[int]) -> None:
    neurons = SplitHeads(**SIZES, whole_groups=whole_groups)
    for part, found in zip("qkv", neurons.rows_of_each(torch.tensor(units)), strict=True):
        mine = [row for row in labels() if row.part == part]
        assert found.tolist() == [
            n for n, row in enumerate(mine) if belongs(row, units, whole_groups=whole_groups)
        ]


@pytest.mark.parametrize("whole_groups", [True, False])
def test_scores_are_means_over_what_the_rows_belong_to(whole_groups: bool) -> None:
    per_row = torch.randn(len(labels()), generator=torch.Generator().manual_seed(0))
    literal = literal_head_scores(per_row.double().tolist(), labels(), whole_groups=whole_groups)
    found = SplitHeads(**SIZES, whole_groups=whole_groups).scores_of_rows(per_row)
    assert_close(found, torch.tensor(list(literal.values())), **FP32_SUMS)


def test_megatrons_layout_would_score_otherwise() -> None:
    """The negative control: the two layouts are not the same rows in the same order."""
    per_row: Tensor = torch.arange(48.0)
    split, fused = SplitHeads(**SIZES, whole_groups=True), Heads(**SIZES, whole_groups=True)
    assert not torch.equal(split.scores_of_rows(per_row), fused.scores_of_rows(per_row))
