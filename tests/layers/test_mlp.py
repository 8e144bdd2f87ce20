"""The sparse MLP against Megatron's dense one with the omitted channels' output weights at zero."""

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_sat.layers.mlp import SparseMLP
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout, tiny_config
from tests.layers.twins import Masks, Run, assert_same, attach, mlp_masks, mlp_pair, run, run_twin, step

RATES = [Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(99, 100)]
WEIGHTS = {"linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight"}
GELU = {"gated_linear_unit": False, "activation_func": F.gelu}
KINDS = [
    pytest.param({}, id="swiglu"),
    pytest.param({"add_bias_linear": True}, id="swiglu-bias"),
    pytest.param({"bias_activation_fusion": True}, id="swiglu-fused"),
    pytest.param({"add_bias_linear": True, "bias_activation_fusion": True}, id="swiglu-bias-fused"),
    pytest.param(GELU, id="gelu"),
    pytest.param({"add_bias_linear": True, **GELU}, id="gelu-bias"),
    pytest.param({"add_bias_linear": True, "bias_activation_fusion": True, **GELU}, id="gelu-bias-fused"),
]


def both(
    _: int, rate: Fraction, changes: dict[str, Any], *, spoil: bool = False, **selection: Any
) -> tuple[Run, Run, dict[str, Tensor], int]:
    """Ours, the twin's, the omitted entries of our gradients, how many channels were kept."""
    layout()
    pair = mlp_pair(**changes)
    selector = attach(pair.sparse, **selection)
    with step(pair.sparse, rate=rate):
        ours = run(pair.sparse, pair.rest)
        assert selector.choice is not None
        index = selector.choice.index
    masks = mlp_masks(index, pair.sparse.config)
    omitted = {
        name: grad[:, ~masks.columns] if name == "linear_fc2.weight" else grad[~masks.rows]
        for name, grad in ours.grads.items()
        if name in WEIGHTS
    }
    if spoil:
        masks.columns[masks.columns.nonzero()[0]] = False
    return ours, run_twin(pair, masks, row_weight="linear_fc2.weight"), omitted, index.numel()


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("rate", RATES, ids=str)
def test_sparse_mlp_equals_dense_mlp_with_omitted_channels_zeroed(rate: Fraction, changes: dict[str, Any]) -> None:
    ours, twins, _, _ = run_ranks(both, 1, rate, changes)[0]
    assert_same(ours, twins)


@pytest.mark.parametrize("changes", KINDS)
def test_omitted_channels_get_exactly_zero_gradient(changes: dict[str, Any]) -> None:
    _, _, omitted, _ = run_ranks(both, 1, Fraction(1, 2), changes)[0]
    assert all(grad.numel() > 0 and not grad.any() for grad in omitted.values())


def test_a_twin_that_lacks_one_kept_channel_is_told_apart() -> None:
    ours, twins, _, _ = run_ranks(both, 1, Fraction(1, 2), {}, spoil=True)[0]
    with pytest.raises(AssertionError):
        assert_same(ours, twins)


@pytest.mark.parametrize(("multiple", "kept"), [(1, [72, 48, 24, 1]), (16, [64, 48, 16, 16])])
def test_as_many_channels_stay_as_rate_and_multiple_leave(multiple: int, kept: list[int]) -> None:
    found = [run_ranks(both, 1, rate, {}, channel_multiple=multiple)[0][-1] for rate in RATES]
    assert found == kept


def run_dense(_: int, attached: bool, changes: dict[str, Any]) -> tuple[Run, Run]:
    """Our module and Megatron's, without a selector or in a dense step."""
    layout()
    pair = mlp_pair(**changes)
    if attached:
        attach(pair.sparse)
    with step(pair.sparse, rate=Fraction(0)):
        return run(pair.sparse, pair.rest), run(pair.twin, pair.rest)


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("attached", [False, True], ids=["no-selector", "rate-0"])
def test_without_a_choice_the_mlp_is_megatrons_bit_for_bit(attached: bool, changes: dict[str, Any]) -> None:
    ours, megatrons = run_ranks(run_dense, 1, attached, changes)[0]
    assert torch.equal(ours.output, megatrons.output)
    assert torch.equal(ours.input_grad, megatrons.input_grad)
    assert all(torch.equal(ours.grads[name], grad) for name, grad in megatrons.grads.items())


def narrower(_: int, changes: dict[str, Any], *, spoil: bool = False) -> tuple[Run, Run]:
    """Ours in bf16 with half its channels, gradients cut; and a plain MLP that has only these."""
    layout()
    pair = mlp_pair(params_dtype=torch.bfloat16, **changes)
    selector = attach(pair.sparse)
    with step(pair.sparse, rate=Fraction(1, 2)):
        ours = run(pair.sparse, pair.rest)
        assert selector.choice is not None
        masks = mlp_masks(selector.choice.index, pair.sparse.config)
    if spoil:
        masks = Masks(*(mask.roll(1) for mask in masks))

    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name: t for name, t in tensors.items() if "_extra_state" not in name}
        tensors["linear_fc2.weight"] = tensors["linear_fc2.weight"][:, masks.columns]
        return tensors | {name: t[masks.rows] for name, t in tensors.items() if "linear_fc1" in name}

    small = mlp_pair(params_dtype=torch.bfloat16, ffn_hidden_size=48, **changes).twin
    small.load_state_dict(cut(pair.sparse.state_dict()))
    return ours._replace(grads=cut(ours.grads)), run(small, pair.rest)


@pytest.mark.parametrize("changes", KINDS)
def test_in_bf16_the_sparse_mlp_is_a_narrower_mlp_bit_for_bit(changes: dict[str, Any]) -> None:
    ours, small = run_ranks(narrower, 1, changes)[0]
    assert torch.equal(ours.output, small.output)
    assert torch.equal(ours.input_grad, small.input_grad)
    assert all(torch.equal(ours.grads[name], grad) for name, grad in small.grads.items())


def test_a_narrower_mlp_of_other_weights_is_told_apart() -> None:
    ours, small = run_ranks(narrower, 1, {}, spoil=True)[0]
    assert not torch.equal(ours.output, small.output)
    assert not any(torch.equal(ours.grads[name], grad) for name, grad in small.grads.items())


def built_by_spec(_: int) -> list[str]:
    """The linear layers of an MLP from a ModuleSpec without submodules, and with other ones."""
    layout()
    plain = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    specs = ModuleSpec(module=SparseMLP), ModuleSpec(module=SparseMLP, submodules=plain)
    return [type(layer).__name__ for spec in specs for layer in spec(config=tiny_config()).linear_pair()]


def test_a_module_spec_builds_it_with_sparse_layers_or_those_it_names() -> None:
    ours, plain = (
        ["SparseColumnParallelLinear", "SparseRowParallelLinear"],
        ["ColumnParallelLinear", "RowParallelLinear"],
    )
    assert run_ranks(built_by_spec, 1)[0] == ours + plain
