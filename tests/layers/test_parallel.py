"""One process and several: the same loss, the same gradients, the same neurons, in every layout.

The steps run through Megatron's own schedules, forward and backward, with two micro-batches each.
"""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch

from tests.helpers.tiny import GPT2, GPT2_OUTSIDE
from tests.helpers.tolerances import FP32_SUMS
from tests.layers.steps import Outcome, Setup, outcome

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "tp4-sp": {"tp": 4, "sequence_parallel": True},
    "cp2": {"cp": 2},
    "tp2-cp2-sp": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "dp2": {"dp": 2},
    "tp2-dp2": {"tp": 2, "dp": 2},
    "pp2": {"pp": 2},
    "pp2-interleaved": {"pp": 2, "virtual_pp": 2},
    "tp2-pp2-sp": {"tp": 2, "pp": 2, "sequence_parallel": True},
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gqa": ({}, {}),
    "single-heads": ({}, {"gqa": "head"}),
    "qwen": ({"add_qkv_bias": True, "qk_layernorm": True}, {}),
    "bias-gelu": (
        {"add_bias_linear": True, "gated_linear_unit": False, "activation_func": torch.nn.functional.gelu},
        {},
    ),
    "wanda": ({}, {"importance": "wanda"}),
    "contribution": ({}, {"importance": "contribution"}),
    "contribution-single-heads": ({}, {"importance": "contribution", "gqa": "head"}),
    "magnitude": ({}, {"importance": "magnitude", "selection": "top-k"}),
    "uniform": ({}, {"importance": "uniform"}),
    "gate+up": ({}, {"swiglu_score": "gate+up", "selection": "top-k"}),
    "lagged": ({}, {"statistics": "lagged"}),
    "inverse-keep": ({}, {"rescale": "inverse-keep"}),
}
GPT2S: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-wanda": {"importance": "wanda"},
    "gpt2-contribution": {"importance": "contribution"},
}
MODELS |= {name: (GPT2, selection) for name, selection in GPT2S.items()}
CASES = [(layout, "gqa") for layout in LAYOUTS]
CASES += [("tp2-cp2-sp", model) for model in MODELS if model != "gqa"]
CASES += [("tp2-pp2-sp", "gpt2"), ("dp2", "gpt2")]


def setup_of(layout: str | None, model: str) -> Setup:
    config, selection = MODELS[model]
    where = dict(LAYOUTS[layout]) if layout else {}
    config = config | {"sequence_parallel": where.pop("sequence_parallel", False)}
    outside = GPT2_OUTSIDE if model in GPT2S else {}
    return Setup(model=config, outside=outside, selection={"selection_groups": 4} | selection, steps=2, **where)


@cache
def alone(model: str) -> Outcome:
    return outcome(setup_of(None, model))


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert found.choices == expected.choices
    torch.testing.assert_close(found.losses, expected.losses, **FP32_SUMS)
    torch.testing.assert_close(found.grads, expected.grads, **FP32_SUMS)


@pytest.mark.parametrize("layout, model", CASES)
def test_a_layout_keeps_the_neurons_and_has_the_loss_and_gradients_of_one_process(layout: str, model: str) -> None:
    assert_same(outcome(setup_of(layout, model)), alone(model))


@cache
def two_ranks() -> Outcome:
    return outcome(setup_of("tp2", "gqa"))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"rate": Fraction(1, 4)}, id="rate"),
        pytest.param({"selection": {"selection_groups": 2}}, id="groups"),
        pytest.param({"selection": {"selection_groups": 4, "seed": 1}}, id="seed"),
        pytest.param({"size": 4}, id="data"),
    ],
)
def test_another_run_is_told_apart(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        assert_same(two_ranks(), outcome(replace(setup_of(None, "gqa"), **changes)))


@pytest.mark.parametrize("part", ["losses", "grads", "choices"])
def test_each_part_of_the_comparison_counts(part: str) -> None:
    expected = alone("gqa")
    spoilt = {
        "losses": expected._replace(losses=[loss * 1.0001 for loss in expected.losses]),
        "grads": expected._replace(grads=expected.grads | {"decoder.final_layernorm.weight": torch.zeros(64)}),
        "choices": expected._replace(choices=expected.choices[::-1]),
    }
    with pytest.raises(AssertionError):
        assert_same(two_ranks(), spoilt[part])


def test_without_selection_groups_the_choice_depends_on_the_tensor_parallel_size() -> None:
    tp1, tp2 = (
        outcome(Setup(tp=tp, selection={"selection_groups": tp, "selection": "top-k"})).choices for tp in (1, 2)
    )
    assert tp1 != tp2
