"""Sparse self-attention against Megatron's dense one with the omitted heads' output weights at zero."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat.layers.core_attention import SDPACoreAttention
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout
from tests.layers.twins import (
    Masks,
    Run,
    assert_same,
    attach,
    attention_masks,
    attention_pair,
    run,
    run_twin,
    step,
)

RATES = [Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(24, 25)]
WEIGHTS = {"linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight"}
GROUPS = [
    pytest.param("group", 8, id="mha"),
    pytest.param("group", 4, id="gqa"),
    pytest.param("head", 2, id="gqa-single-heads"),
]
EXTRAS = [
    pytest.param({}, id="plain"),
    pytest.param({"add_qkv_bias": True}, id="qkv-bias"),
    pytest.param({"add_bias_linear": True}, id="bias"),
    pytest.param({"qk_layernorm": True}, id="qk-norm"),
]


def both(
    _: int, gqa: str, groups: int, rate: Fraction, extras: dict[str, Any], *, spoil: bool = False
) -> tuple[Run, Run, dict[str, Tensor], int]:
    """Ours, the twin's, the omitted entries of our gradients, how many heads or groups were kept."""
    layout()
    pair = attention_pair(num_query_groups=groups, **extras)
    selector = attach(pair.sparse, gqa=gqa)
    with step(pair.sparse, rate=rate):
        ours = run(pair.sparse, pair.rest)
        assert selector.choice is not None
        index = selector.choice.index
    masks = attention_masks(index, pair.sparse.config, gqa=gqa)
    omitted = {
        name: grad[:, ~masks.columns] if name == "linear_proj.weight" else grad[~masks.rows]
        for name, grad in ours.grads.items()
        if name in WEIGHTS
    }
    if spoil:
        masks.columns[masks.columns.nonzero()[0]] = False
    return ours, run_twin(pair, masks, row_weight="linear_proj.weight"), omitted, index.numel()


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize(("gqa", "groups"), GROUPS)
def test_sparse_attention_equals_dense_attention_with_omitted_heads_zeroed(
    gqa: str, groups: int, rate: Fraction, extras: dict[str, Any]
) -> None:
    ours, twins, _, _ = run_ranks(both, 1, gqa, groups, rate, extras)[0]
    assert_same(ours, twins)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize(("gqa", "groups"), GROUPS)
def test_omitted_heads_get_exactly_zero_gradient(gqa: str, groups: int, extras: dict[str, Any]) -> None:
    _, _, omitted, _ = run_ranks(both, 1, gqa, groups, Fraction(1, 2), extras)[0]
    assert all(grad.numel() > 0 and not grad.any() for grad in omitted.values())


def test_a_twin_that_lacks_one_kept_column_is_told_apart() -> None:
    ours, twins, _, _ = run_ranks(both, 1, "group", 4, Fraction(1, 2), {}, spoil=True)[0]
    with pytest.raises(AssertionError):
        assert_same(ours, twins)


@pytest.mark.parametrize(
    ("gqa", "groups", "kept"),
    [("group", 8, [6, 4, 2, 1]), ("group", 4, [3, 2, 1, 1]), ("head", 2, [6, 4, 2, 2])],
)
def test_as_many_units_stay_as_the_rate_leaves_and_never_none(gqa: str, groups: int, kept: list[int]) -> None:
    found = [run_ranks(both, 1, gqa, groups, rate, {})[0][-1] for rate in RATES]
    assert found == kept


def run_dense(_: int, attached: bool, extras: dict[str, Any]) -> tuple[Run, Run]:
    """Our module, without a selector or in a dense step, and Megatron's with the same core attention."""
    layout()
    pair = attention_pair(SDPACoreAttention, **extras)
    if attached:
        attach(pair.sparse)
    with step(pair.sparse, rate=Fraction(0)):
        return run(pair.sparse, pair.rest), run(pair.twin, pair.rest)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("attached", [False, True], ids=["no-selector", "rate-0"])
def test_without_a_choice_the_attention_is_megatrons_bit_for_bit(attached: bool, extras: dict[str, Any]) -> None:
    ours, megatrons = run_ranks(run_dense, 1, attached, extras)[0]
    assert torch.equal(ours.output, megatrons.output)
    assert torch.equal(ours.input_grad, megatrons.input_grad)
    assert all(torch.equal(ours.grads[name], grad) for name, grad in megatrons.grads.items())


def narrower(_: int, gqa: str, groups: int, extras: dict[str, Any], *, spoil: bool = False) -> tuple[Run, Run]:
    """Ours in bf16 with half its heads, gradients cut; and a plain attention that has only these."""
    layout()
    bf16 = {"params_dtype": torch.bfloat16, "kv_channels": 8, **extras}
    pair = attention_pair(num_query_groups=groups, **bf16)
    selector = attach(pair.sparse, gqa=gqa)
    with step(pair.sparse, rate=Fraction(1, 2)):
        ours = run(pair.sparse, pair.rest)
        assert selector.choice is not None
        masks = attention_masks(selector.choice.index, pair.sparse.config, gqa=gqa)
    if spoil:
        masks = Masks(*(mask.roll(1) for mask in masks))

    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name: t for name, t in tensors.items() if "_extra_state" not in name}
        tensors["linear_proj.weight"] = tensors["linear_proj.weight"][:, masks.columns]
        return tensors | {name: t[masks.rows] for name, t in tensors.items() if "linear_qkv" in name}

    kept_groups = groups // 2 if gqa == "group" else groups
    small = attention_pair(SDPACoreAttention, num_attention_heads=4, num_query_groups=kept_groups, **bf16).twin
    small.load_state_dict(cut(pair.sparse.state_dict()))
    return ours._replace(grads=cut(ours.grads)), run(small, pair.rest)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize(("gqa", "groups"), GROUPS)
def test_in_bf16_the_sparse_attention_is_a_narrower_attention_bit_for_bit(
    gqa: str, groups: int, extras: dict[str, Any]
) -> None:
    ours, small = run_ranks(narrower, 1, gqa, groups, extras)[0]
    assert torch.equal(ours.output, small.output)
    assert torch.equal(ours.input_grad, small.input_grad)
    assert all(torch.equal(ours.grads[name], grad) for name, grad in small.grads.items())


def test_a_narrower_attention_of_other_weights_is_told_apart() -> None:
    ours, small = run_ranks(narrower, 1, "group", 4, {}, spoil=True)[0]
    assert not torch.equal(ours.output, small.output)
    assert not any(torch.equal(ours.grads[name], grad) for name, grad in small.grads.items())
