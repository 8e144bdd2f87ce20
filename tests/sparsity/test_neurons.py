"""Where units lie in the fused matrices: every row and column labelled, and read back by its label."""

from fractions import Fraction
from itertools import product

import pytest
import torch

from megatron_sat.sparsity.neurons import Channels, Heads, Kept
from tests.helpers.reference import label_qkv, literal_head_scores, mean
from tests.helpers.tolerances import EXACT, FP32_SUMS

SHAPES = [(4, 1, 3), (3, 2, 4), (2, 5, 1), (1, 3, 2)]
"""(query groups, heads in a group, head dim): no grouped queries, some, many, a single group."""


def heads_of(shape: tuple[int, int, int], *, whole_groups: bool) -> Heads:
    groups, heads_per_group, head_dim = shape
    return Heads(groups=groups, heads_per_group=heads_per_group, head_dim=head_dim, whole_groups=whole_groups)


def labels_of(heads: Heads):
    return label_qkv(groups=heads.groups, heads_per_group=heads.heads_per_group, head_dim=heads.head_dim)


def index_of(*units: int) -> torch.Tensor:
    return torch.tensor(units, dtype=torch.int64)


def every_choice(heads: Heads) -> list[torch.Tensor]:
    """Whole groups: all non-empty sets of them. Single heads: the same number of any heads in every group."""
    if heads.whole_groups:
        masks = product([False, True], repeat=heads.groups)
        return [torch.tensor(mask).nonzero().squeeze(1) for mask in masks if any(mask)]
    n = heads.heads_per_group
    per_group = [mask for mask in product([False, True], repeat=n) if any(mask)]
    choices = []
    for masks in product(per_group, repeat=heads.groups):
        if len({sum(mask) for mask in masks}) == 1:
            choices.append(torch.tensor(masks).flatten().nonzero().squeeze(1))
    return choices


def test_omitted_units_are_those_not_kept_in_order():
    kept = Kept(index=index_of(1, 2, 5), units=7)

    assert kept.omitted().tolist() == [0, 3, 4, 6]
    assert kept.omitted().dtype == torch.int64
    assert Kept(index=torch.arange(7), units=7).omitted().tolist() == []


def test_the_share_kept_is_exact():
    assert Kept(index=index_of(0, 4, 9), units=10).keep_rate == Fraction(3, 10)


@pytest.mark.parametrize("gated", [True, False])
def test_a_channel_is_its_rows_of_gate_and_up_and_its_column_of_down(gated):
    channels = Channels(units=6, gated=gated)
    rows = [(part, c) for part in (("gate", "up") if gated else ("only",)) for c in range(6)]
    index = index_of(0, 3, 4)

    assert channels.rows(index).tolist() == [place for place, (_, c) in enumerate(rows) if c in (0, 3, 4)]
    assert channels.kept_rows(index).tolist() == channels.rows(index).tolist()
    assert channels.columns(index).tolist() == [0, 3, 4]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_query_group_is_the_rows_and_columns_that_carry_its_label(shape):
    heads = heads_of(shape, whole_groups=True)
    labels = labels_of(heads)

    for index in every_choice(heads):
        chosen = [place for place, row in enumerate(labels) if row.group in index.tolist()]
        assert heads.rows(index).tolist() == heads.kept_rows(index).tolist() == chosen


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 1])
def test_a_single_head_is_its_query_rows_and_a_step_needs_all_keys_and_values_too(shape):
    heads = heads_of(shape, whole_groups=False)
    labels = labels_of(heads)

    for index in every_choice(heads):
        chosen = {divmod(unit, heads.heads_per_group) for unit in index.tolist()}
        own = [place for place, row in enumerate(labels) if (row.group, row.head) in chosen]
        needed = [place for place, row in enumerate(labels) if row.part != "q" or place in own]
        assert heads.rows(index).tolist() == own
        assert heads.kept_rows(index).tolist() == needed


@pytest.mark.parametrize("whole_groups", [True, False])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 1])
def test_the_columns_of_proj_are_those_of_the_chosen_heads(shape, whole_groups):
    heads = heads_of(shape, whole_groups=whole_groups)
    labels = [(g, n, d) for g in range(shape[0]) for n in range(shape[1]) for d in range(shape[2])]

    for index in every_choice(heads):
        units = index.tolist()
        unit_of = {(g, n): g if whole_groups else g * shape[1] + n for g, n, _ in labels}
        expected = [place for place, (g, n, _) in enumerate(labels) if unit_of[g, n] in units]
        assert heads.columns(index).tolist() == expected


@pytest.mark.parametrize("whole_groups", [True, False])
def test_kept_rows_are_a_smaller_fused_qkv_that_reads_as_megatron_reads_it(whole_groups):
    heads = heads_of((3, 4, 2), whole_groups=whole_groups)
    index = index_of(0, 2) if whole_groups else index_of(0, 3, 5, 6, 9, 11)  # of head mode two in each group
    groups, queries = (2, 4) if whole_groups else (3, 2)
    labels = [labels_of(heads)[place] for place in heads.kept_rows(index).tolist()]

    fused = [labels[start : start + (queries + 2) * 2] for start in range(0, len(labels), (queries + 2) * 2)]
    assert len(fused) == groups
    for block in fused:
        assert len({row.group for row in block}) == 1
        assert [row.part for row in block[::2]] == ["q"] * queries + ["k", "v"]
        assert [row.dim for row in block] == [0, 1] * (queries + 2)


@pytest.mark.parametrize("whole_groups", [True, False])
def test_kept_and_omitted_units_share_nothing_and_leave_out_only_common_keys_and_values(whole_groups):
    heads = heads_of((2, 3, 2), whole_groups=whole_groups)
    labels = labels_of(heads)

    for index in every_choice(heads):
        omitted = Kept(index=index, units=heads.units).omitted()
        kept_rows, omitted_rows = set(heads.kept_rows(index).tolist()), set(heads.rows(omitted).tolist())
        assert not kept_rows & omitted_rows
        assert kept_rows | omitted_rows == set(range(len(labels)))
        columns = torch.cat([heads.columns(index), heads.columns(omitted)])
        assert sorted(columns.tolist()) == list(range(2 * 3 * 2))


@pytest.mark.parametrize(
    ("source", "expected"),
    [("gate", [1.0, 2.0, 3.0]), ("up", [10.0, 20.0, 40.0]), ("gate+up", [5.5, 11.0, 21.5])],
)
def test_a_gated_channel_is_scored_by_the_rows_that_are_named(source, expected):
    channels = Channels(units=3, gated=True, score_source=source)

    scored = channels.scored_rows(torch.tensor([1.0, 2, 3, 10, 20, 40]))
    assert channels.scores_of_rows(scored).tolist() == expected


@pytest.mark.parametrize("source", ["gate", "up", "gate+up"])
def test_a_channel_without_a_gate_is_scored_by_its_only_row(source):
    scores = torch.tensor([3.0, 1.0, 2.0])

    plain = Channels(units=3, gated=False, score_source=source)
    assert plain.scores_of_rows(plain.scored_rows(scores)).tolist() == [3.0, 1.0, 2.0]
    assert plain.scores_of_columns(scores).tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("whole_groups", [True, False])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 1])
def test_a_head_scores_the_mean_of_its_means_over_q_k_and_v(shape, whole_groups):
    heads = heads_of(shape, whole_groups=whole_groups)
    labels = labels_of(heads)
    per_row = torch.randn(len(labels), generator=torch.Generator().manual_seed(1))

    literal = literal_head_scores(per_row.tolist(), labels, whole_groups=whole_groups)
    expected = torch.tensor([literal[key] for key in sorted(literal)])
    torch.testing.assert_close(heads.scores_of_rows(per_row), expected, **FP32_SUMS)


def test_the_mean_of_means_is_not_the_mean_of_all_rows_under_grouped_queries():
    heads = heads_of((2, 3, 2), whole_groups=True)
    per_row = torch.randn(20, generator=torch.Generator().manual_seed(1))

    flat = per_row.view(2, -1).mean(1)
    assert not torch.allclose(heads.scores_of_rows(per_row), flat, rtol=1e-2)


@pytest.mark.parametrize("whole_groups", [True, False])
def test_columns_of_proj_score_their_head_or_group_by_the_mean(whole_groups):
    heads = heads_of((2, 3, 2), whole_groups=whole_groups)
    per_column = [float(n * n) for n in range(12)]

    size = 6 if whole_groups else 2
    expected = torch.tensor([mean(per_column[at : at + size]) for at in range(0, 12, size)])
    torch.testing.assert_close(heads.scores_of_columns(torch.tensor(per_column)), expected, **FP32_SUMS)


def test_without_grouped_queries_a_group_is_a_head():
    heads = heads_of((4, 1, 3), whole_groups=True)

    assert heads.units == 4
    torch.testing.assert_close(heads.columns(index_of(2)), index_of(6, 7, 8), **EXACT)


def test_single_heads_are_refused_where_a_group_has_only_one():
    with pytest.raises(
        ValueError,
        match=r"--sat-gqa head needs several heads in a query group, got 1: no .*; use --sat-gqa group",
    ):
        heads_of((4, 1, 3), whole_groups=False)
