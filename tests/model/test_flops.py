"""The formula against torch's counter on the real model: whole, sparse, recomputed, with and without GQA."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from megatron_sat.layers.attach import attach_selectors
from megatron_sat.model.flops import (
    KeptShape,
    ModelShape,
    Recompute,
    choice_flops,
    kept_shape,
    layer_forward_flops,
    shape_of,
    step_flops,
    whole,
)
from megatron_sat.sparsity.controller import Controller, sparse_modules
from megatron_sat.sparsity.importance import METRICS
from megatron_sat.sparsity.schedule import ScheduleConfig, build_schedule
from megatron_sat.sparsity.selector import SelectionConfig
from tests.helpers.counting import as_causal, by_product, counting
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import GPT2, GPT2_OUTSIDE, SEQ, VOCAB, batch, layout, losses, tiny_chunks, tiny_config

LLAMA_7B = ModelShape(
    num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=32, kv_channels=128,
    ffn_hidden_size=11008, gated=True, padded_vocab_size=32000, seq_length=4096,
)  # fmt: skip
TINY = ModelShape(
    num_layers=4, hidden_size=64, num_attention_heads=8, num_query_groups=4, kv_channels=8,
    ffn_hidden_size=96, gated=True, padded_vocab_size=VOCAB, seq_length=SEQ,
)  # fmt: skip
SIZE = 2
TOKENS = SIZE * SEQ


def count_steps(
    _: int, rates: list[Fraction], config: dict[str, Any], selection: dict[str, Any], *, tp: int = 1
) -> list[dict[str, int]]:
    """torch's count of one forward and backward of the sparse model at each rate, by kind of product."""
    there = layout(tp=tp)
    outside = {name: config.pop(name) for name in GPT2_OUTSIDE if name in config}
    (chunk,) = tiny_chunks(tiny_config(**config), **outside)
    attach_selectors([chunk], config=SelectionConfig(**selection), layout=there)
    counted = []
    for step, rate in enumerate(rates, start=1):
        schedule = build_schedule(ScheduleConfig(kind="constant", omission_rate=rate, train_iters=len(rates)))
        controller = Controller(sparse_modules([chunk]), schedule=schedule, interval=1)
        with controller.step(step), counting() as counter:
            losses(chunk, *batch(step, SIZE)).mean().backward()
        counted.append(by_product(counter))
    return counted


def counted_at(
    *rates: Fraction, selection: dict[str, Any] | None = None, **config: Any
) -> list[dict[str, int]]:
    return run_ranks(count_steps, 1, list(rates), config, {"importance": "uniform", **(selection or {})})[0]


def kept_at(rate: Fraction, *, gqa: str = "group", shape: ModelShape = TINY, groups: int = 1) -> KeptShape:
    return kept_shape(shape, rate, selection_groups=groups, channel_multiple=1, gqa=gqa)


WHOLE_LAYERS = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TWO_LAYERS = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
MODULES = {"recompute_granularity": "selective"}
RECOMPUTES: dict[str, tuple[dict[str, Any], Recompute]] = {
    "every layer": (WHOLE_LAYERS, Recompute(parts=("full",))),
    "two layers": (TWO_LAYERS, Recompute(parts=("full",), layers=2)),
    "attention": (MODULES | {"recompute_modules": ["core_attn"]}, Recompute(parts=("core_attn",))),
    "mlp": (MODULES | {"recompute_modules": ["mlp"]}, Recompute(parts=("mlp",))),
}

RATES = [Fraction(0), Fraction(1, 4), Fraction(1, 2), Fraction(24, 25)]


@pytest.mark.parametrize("gqa", ["group", "head"])
def test_the_formula_is_what_torch_counts_at_every_rate(gqa):
    counted = counted_at(*RATES, selection={"gqa": gqa, "selection_groups": 2})

    expected = [kept_at(rate, gqa=gqa, groups=2) for rate in RATES]
    assert [sum(ops.values()) for ops in counted] == [
        step_flops(TINY, kept, tokens=TOKENS, causal=False) for kept in expected
    ]
    assert len({kept.channels for kept in expected}) == 4  # four different counts, or the test says little


def test_the_formula_is_what_torch_counts_of_gpt2():
    """Two matrices an MLP, a group of each head, a tied head; biases and positions are no products."""
    shape = replace(TINY, num_query_groups=8, gated=False)
    counted = counted_at(*RATES, **GPT2, **GPT2_OUTSIDE)

    expected = [kept_at(rate, shape=shape) for rate in RATES]
    assert [sum(ops.values()) for ops in counted] == [
        step_flops(shape, kept, tokens=TOKENS, causal=False) for kept in expected
    ]
    assert len({(kept.heads, kept.channels) for kept in expected}) == 4


PARTS: list[dict[str, Any]] = [
    {"modules": "mlp"}, {"modules": "attention"}, {"whole_ends": 1}, {"omit": "backward"}, {"omit": "weight-gradient"},
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("recompute", ["every layer", "mlp"])
def test_the_formula_is_what_torch_counts_where_a_part_of_the_model_omits(recompute, part):
    config, parts = RECOMPUTES[recompute]
    counted = counted_at(Fraction(0), Fraction(1, 2), selection=part, **config)

    where = {
        "modules": part.get("modules", "all"),
        "whole_layers": 2 * part.get("whole_ends", 0),
        "omit": part.get("omit", "both"),
    }
    expected = [
        kept_shape(TINY, rate, selection_groups=1, channel_multiple=1, gqa="group", **where)
        for rate in (Fraction(0), Fraction(1, 2))
    ]
    assert expected[0] == whole(TINY)
    assert expected[1] not in (whole(TINY), kept_at(Fraction(1, 2)))
    assert [sum(ops.values()) for ops in counted] == [
        step_flops(TINY, kept, tokens=TOKENS, recompute=parts, causal=False) for kept in expected
    ]


def test_choosing_costs_the_modules_that_choose():
    for importance in METRICS:
        cost = {
            modules: choice_flops(TINY, importance=importance, tokens=TOKENS, modules=modules)
            for modules in ("all", "attention", "mlp")
        }
        assert cost["all"] == cost["attention"] + cost["mlp"]
        half = choice_flops(TINY, importance=importance, tokens=TOKENS, whole_layers=2)
        assert 2 * half == cost["all"]


def test_tensor_parallel_ranks_together_compute_what_the_formula_says():
    selection = {"importance": "uniform", "selection_groups": 2}
    ranks = run_ranks(count_steps, 2, [Fraction(1, 2)], {}, selection, tp=2)

    kept = kept_at(Fraction(1, 2), groups=2)
    assert sum(sum(ops.values()) for (ops,) in ranks) == step_flops(TINY, kept, tokens=TOKENS, causal=False)


def test_a_formula_that_forgets_grouped_queries_is_not_what_torch_counts():
    (counted,) = counted_at(Fraction(0))
    without_groups = replace(TINY, num_query_groups=8)

    assert sum(counted.values()) != step_flops(
        without_groups, whole(without_groups), tokens=TOKENS, causal=False
    )


def test_the_formula_is_what_torch_counts_without_gate_and_without_groups():
    config = {"gated_linear_unit": False, "num_query_groups": 8, "kv_channels": 16, "ffn_hidden_size": 80}
    shape = replace(TINY, gated=False, num_query_groups=8, kv_channels=16, ffn_hidden_size=80)
    counted = counted_at(Fraction(0), Fraction(1, 2), **config)

    assert [sum(ops.values()) for ops in counted] == [
        step_flops(shape, kept_at(rate, shape=shape), tokens=TOKENS, causal=False)
        for rate in (0, Fraction(1, 2))
    ]


@pytest.mark.parametrize("name", RECOMPUTES)
def test_recomputed_forwards_are_counted_as_torch_counts_them(name):
    config, recompute = RECOMPUTES[name]
    counted = counted_at(Fraction(0), Fraction(1, 2), **config)

    executed = [
        step_flops(TINY, kept_at(rate), tokens=TOKENS, recompute=recompute, causal=False)
        for rate in (0, Fraction(1, 2))
    ]
    assert [sum(ops.values()) for ops in counted] == executed
    assert executed[0] > step_flops(TINY, whole(TINY), tokens=TOKENS, causal=False)


def test_a_recomputed_norm_is_no_matrix_product():
    norms = Recompute(parts=("layernorm",))

    assert step_flops(TINY, whole(TINY), tokens=1, recompute=norms) == step_flops(TINY, whole(TINY), tokens=1)


def test_causal_attention_counts_each_token_with_those_before_it_and_itself():
    (counted,) = counted_at(Fraction(0))
    causal = as_causal(counted, seq=SEQ)

    assert step_flops(TINY, whole(TINY), tokens=TOKENS) == causal < sum(counted.values())


@pytest.mark.parametrize("importance", ["maxip", "contribution"])
def test_choosing_costs_on_top_of_the_step_what_torch_counts(importance):
    (counted,) = counted_at(Fraction(1, 2), selection={"importance": importance})
    step = step_flops(TINY, kept_at(Fraction(1, 2)), tokens=TOKENS, causal=False)
    forward = layer_forward_flops(TINY, whole(TINY), causal=False)
    look = TOKENS * 4 * (forward["qkv"] + forward["core_attn"] + forward["mlp"] * 2 // 3)  # not proj, not fc2

    assert sum(counted.values()) - step == (look if importance == "contribution" else 0)


def test_scores_cost_what_a_literal_count_of_their_operations_says():
    rows, columns, hidden = (8 + 4 + 4) * 8 + 96 + 96, 64 + 96, 64
    forward = layer_forward_flops(TINY, whole(TINY))
    seen = forward["qkv"] + forward["core_attn"] + 2 * hidden * (96 + 96)
    one_layer = {
        "uniform": 0,
        "magnitude": rows * hidden * 2,  # square, add
        "wanda": 2 * TOKENS * hidden * 2 + rows * hidden * 2,  # two inputs: square, add; then the products
        "maxip": 2 * TOKENS * hidden + rows * hidden * 2,
        "contribution": TOKENS * seen + columns * TOKENS * 2 + columns * hidden * 2,
    }

    assert one_layer.keys() == METRICS.keys()
    for importance, flops in one_layer.items():
        assert choice_flops(TINY, importance=importance, tokens=TOKENS) == 4 * flops
        assert choice_flops(TINY, importance=importance, tokens=TOKENS, replicas=3) == 12 * flops


def test_maxip_scores_are_a_small_part_of_a_sparse_step_of_7b():
    kept = kept_at(Fraction(1, 2), shape=LLAMA_7B)

    share = choice_flops(LLAMA_7B, importance="maxip", tokens=4096) / step_flops(LLAMA_7B, kept, tokens=4096)
    assert 0 < share < 0.001


def test_a_dense_7b_step_is_near_six_operations_a_parameter_and_token():
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000

    assert 1.0 < step_flops(LLAMA_7B, whole(LLAMA_7B), tokens=1, causal=True) / (6 * parameters) < 1.1


def count_selectors(_: int, rate: Fraction, selection: dict[str, Any]) -> set[tuple[str, int]]:
    """Units that the selectors of the real model keep."""
    there = layout()
    (chunk,) = tiny_chunks()
    attach_selectors([chunk], config=SelectionConfig(**selection), layout=there)
    controller = Controller(
        sparse_modules([chunk]), schedule=build_schedule(ScheduleConfig(train_iters=1)), interval=1
    )
    return {(selector.place.kind, selector.count(rate)) for selector in controller.selectors}


@pytest.mark.parametrize("gqa", ["group", "head"])
@pytest.mark.parametrize("rate", [Fraction(0), Fraction(3, 10), Fraction(24, 25)])
def test_kept_counts_are_those_of_the_models_selectors(gqa, rate):
    selection = {"gqa": gqa, "selection_groups": 2, "channel_multiple": 16}
    (units,) = run_ranks(count_selectors, 1, rate, selection)

    kept = kept_shape(TINY, rate, selection_groups=2, channel_multiple=16, gqa=gqa)
    assert units == {("attention", kept.groups if gqa == "group" else kept.heads), ("mlp", kept.channels)}
    assert kept.heads == 2 * kept.groups if gqa == "group" else kept.groups == 4


def test_quotas_of_eight_ranks_keep_a_head_each_at_any_rate():
    assert kept_at(Fraction(24, 25), shape=LLAMA_7B, groups=8).heads == 8
    assert kept_at(Fraction(24, 25), shape=LLAMA_7B, groups=1).heads == 1
    assert [kept_at(Fraction(r, 10), shape=LLAMA_7B, groups=8).heads for r in (5, 4, 3, 2, 1, 0)] == [
        16, 16, 16, 24, 24, 32,
    ]  # fmt: skip


def test_the_shape_is_read_from_a_transformer_config():
    config = run_ranks(read_shape, 1)[0]

    assert config == TINY


def read_shape(_: int) -> ModelShape:
    layout()
    return shape_of(tiny_config(), padded_vocab_size=VOCAB, seq_length=SEQ)


@pytest.mark.parametrize(("groups", "gqa", "message"), [
    (8, "group", r"--sat-selection-groups \(8\) must divide the query groups \(4\); try the tensor-par"),
    (5, "head", r"--sat-selection-groups \(5\) must divide the channels \(96\); try the tensor-parallel"),
])  # fmt: skip
def test_selection_groups_that_do_not_fit_are_refused(groups, gqa, message):
    with pytest.raises(ValueError, match=message):
        kept_at(Fraction(1, 2), groups=groups, gqa=gqa)


def test_shapes_that_no_model_has_are_refused():
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0; give the model's own"):
        replace(TINY, hidden_size=0)
    with pytest.raises(ValueError, match=r"num_query_groups \(3\) must divide num_attention_heads \(8\)"):
        replace(TINY, num_query_groups=3)


def test_an_unknown_part_to_recompute_is_refused():
    with pytest.raises(
        ValueError, match="--recompute-modules must be among core_attn, mlp, layernorm, got moe; a Llama"
    ):
        Recompute(parts=("core_attn", "moe"))
