"""What a selector chooses, when, and from what: against literal twins and a record of what it asked for."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch

from megatron_sat.sparsity.growing import Growing
from megatron_sat.sparsity.importance import METRICS
from megatron_sat.sparsity.selector import SelectionConfig
from tests.helpers.choosing import (
    CHANNELS,
    GROUPS,
    HALF,
    HEAD_DIM,
    PER_GROUP,
    SmallModule,
    choose,
    choose_over,
    in_step,
    tokens_of,
)
from tests.helpers.noise import gumbel_noise
from tests.helpers.reference import (
    label_qkv,
    literal_contribution,
    literal_head_scores,
    literal_keep_count,
    literal_scores,
    literal_select,
    mean,
)

KINDS: list[tuple[str, str]] = [("mlp", "group"), ("attention", "group"), ("attention", "head")]
"""(kind, gqa)"""
QUARTER = Fraction(1, 4)


def literal_unit_scores(module: SmallModule, tokens: torch.Tensor) -> list[float]:
    """Eq. 5 to 7 for every unit of a whole module, by loops."""
    flat, importance = tokens.reshape(-1, tokens.size(-1)), module.config.importance
    is_mlp, whole = module.chooser.place.kind == "mlp", module.config.gqa == "group"
    if importance == "contribution":
        columns = literal_contribution(module.row.detach(), module.activations(flat))
        width = 1 if is_mlp else HEAD_DIM * (PER_GROUP if whole else 1)
        return [mean(columns[at : at + width]) for at in range(0, len(columns), width)]
    rows = literal_scores(importance, module.column.detach(), flat)
    if is_mlp:
        return rows[:CHANNELS]  # gate
    labels = label_qkv(groups=GROUPS, heads_per_group=PER_GROUP, head_dim=HEAD_DIM)
    scores = literal_head_scores(rows, labels, whole_groups=whole)
    return [scores[key] for key in sorted(scores)]


# -- which


@pytest.mark.parametrize("selection", ["sampling", "top-k"])
@pytest.mark.parametrize("importance", METRICS)
@pytest.mark.parametrize(("kind", "gqa"), KINDS)
def test_a_choice_is_scores_noise_and_quota_read_literally(kind, gqa, importance, selection):
    settings = {"gqa": gqa, "importance": importance, "selection": selection, "temperature": 0.5, "seed": 9}
    module = SmallModule(kind, layer=5, **settings)
    groups = module.chooser.place.groups
    keys = literal_unit_scores(module, tokens_of(1))
    if selection == "sampling":
        noise = gumbel_noise(len(keys), seed=9, step=4, layer=5, kind=kind).tolist()
        keys = [key / 0.5 + value for key, value in zip(keys, noise, strict=True)]

    keep = literal_keep_count(len(keys) // groups, HALF)
    assert choose(module, 4) == literal_select(keys, groups=groups, keep=keep)


@pytest.mark.parametrize("importance", METRICS)
@pytest.mark.parametrize(("kind", "gqa"), KINDS)
def test_with_selection_groups_any_number_of_shards_chooses_the_same(kind, gqa, importance):
    settings = {"gqa": gqa, "importance": importance}
    steps = [
        [choose_over(shards, kind, step=step, **settings) for shards in (1, 2, 4)] for step in range(1, 7)
    ]

    assert all(whole == halves == quarters for whole, halves, quarters in steps)
    assert any(before != after for before, after in pairwise(steps))


def test_with_quotas_that_follow_the_shards_the_choice_depends_on_them():
    chosen = [choose_over(shards, selection_groups=shards, selection="top-k") for shards in (1, 2, 4)]

    assert len({tuple(index) for index in chosen}) == 3
    assert {len(index) for index in chosen} == {8}


@pytest.mark.parametrize(
    "changed", [{"layer": 4}, {"seed": 1}, {"temperature": 50.0}, {"swiglu_score": "up"}]
)
def test_layer_seed_temperature_and_score_source_each_change_the_choice(changed):
    usual = [choose(SmallModule(), step) for step in range(1, 9)]

    assert [choose(SmallModule(**changed), step) for step in range(1, 9)] != usual


def test_kept_channels_of_every_group_are_a_multiple():
    module = SmallModule(selection_groups=2, multiple=3)  # 8 channels a group

    assert [module.chooser.count(rate) for rate in (Fraction(0), QUARTER, HALF, Fraction(24, 25))] == [
        16,
        12,
        6,
        6,
    ]
    assert len(choose(module, rate=HALF) or []) == 6


def test_a_multiple_that_no_group_can_hold_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match=r"selection group \(4\), got 5; lower --sat-channel-multiple"):
        SmallModule(multiple=5)


@pytest.mark.parametrize("importance", ["wanda", "maxip", "contribution"])
def test_the_choice_is_made_from_the_tokens_of_all_ranks(importance):
    settings: dict[str, Any] = {"importance": importance, "selection": "top-k", "selection_groups": 1}
    shared = SmallModule(others=tokens_of(2), **settings)
    whole = SmallModule(**settings)
    with in_step(whole, 1):
        of_both = whole.forward(torch.cat([tokens_of(1), tokens_of(2)]))

    assert choose(shared, number=1) == of_both
    assert choose(SmallModule(**settings), number=1) != of_both
    assert shared.asked == [METRICS[importance].needs]


# -- what follows


@pytest.mark.parametrize(("rate", "scale"), [(HALF, 2.0), (QUARTER, 4 / 3), (Fraction(9, 10), 4.0)])
def test_inverse_keep_scales_by_what_is_really_kept(rate, scale):
    module = SmallModule(rescale="inverse-keep")
    plain = SmallModule()
    with in_step(module, 1, rate=rate) as selector, in_step(plain, 1, rate=rate) as unscaled:
        module.forward(tokens_of(1))
        plain.forward(tokens_of(1))
        assert (selector.output_scale, unscaled.output_scale) == (scale, 1.0)


def test_visits_count_the_steps_in_which_each_unit_was_kept():
    module = SmallModule()
    counted = torch.zeros(CHANNELS, dtype=torch.int32)
    for step in range(1, 6):
        for unit in choose(module, step, number=step) or []:
            counted[unit] += 1
    choose(module, 6, rate=Fraction(0))

    assert module.chooser.visits.tolist() == (counted + 1).tolist()
    assert module.chooser.visited_steps == 6


def test_a_step_without_a_forward_visits_no_unit():
    module = SmallModule()
    choose(module, 1)
    before = module.chooser.visits.clone()
    with in_step(module, 2):
        pass

    assert torch.equal(module.chooser.visits, before)
    assert module.chooser.visited_steps == 2


# -- settings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("importance", "wandb", "--sat-importance must be one of uniform, .*, contribution, got 'wandb'"),
        ("swiglu_score", "down", r"--sat-swiglu-score must be one of gate, up, gate\+up, got 'down'"),
        ("selection", "topk", "--sat-selection must be one of sampling, top-k, mixed-growing, got 'topk'"),
        ("selection", "mixed-growing", "--sat-selection mixed-growing must have the settings of .*; use sampling or"),
        ("growing", Growing(replaced=0.3, random_share=0.25, last_step=9), "growing must be None with --sat-selection"),
        ("gqa", "heads", "--sat-gqa must be one of group, head, got 'heads'"),
        ("statistics", "old", "--sat-statistics must be one of fresh, lagged, got 'old'"),
        ("dp_selection", "global", "--sat-dp-selection must be one of shared, local, got 'global'"),
        ("rescale", "est", "--sat-rescale must be one of none, inverse-keep, got 'est'"),
        ("selection_groups", 0, "--sat-selection-groups must be at least 1, got 0"),
        ("selection_interval", 0, "--sat-selection-interval must be at least 1, got 0"),
        ("channel_multiple", -1, "--sat-channel-multiple must be at least 1, got -1"),
        ("temperature", 0.0, "--sat-temperature must be above 0, got 0.0; the paper uses 0.05"),
        ("temperature", float("nan"), "--sat-temperature must be above 0, got nan; the paper uses 0.05"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_flag(field, value, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**{field: value})


def test_the_defaults_are_the_papers_best_and_ours():
    config = SelectionConfig()

    assert (config.importance, config.selection, config.temperature) == ("maxip", "sampling", 0.05)
    assert (config.statistics, config.dp_selection, config.rescale) == ("fresh", "shared", "none")
    assert (config.selection_interval, config.gqa, config.swiglu_score) == (1, "group", "gate")
