"""A linear layer cut to some of its rows or columns, gathered or packed, against slices of the weight."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear
from torch.testing import assert_close

from megatron_sat.hf.cut import Cut, CutLinear, make_cuttable, make_plain, pack
from tests.helpers.tolerances import EXACT, FP32_SUMS

INDEX = torch.tensor([1, 2, 5])


def make_layer(*, bias: bool = True) -> CutLinear:
    torch.manual_seed(0)
    return make_cuttable(Linear(7, 6, bias=bias))


def inputs(dim: int, *, seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 7 if dim == 0 else 3, generator=torch.Generator().manual_seed(seed))


def run(layer: CutLinear, dim: int, *, packed: bool, uses: int = 3, scale: float = 1.0) -> list[Tensor | None]:
    """Outputs of ``uses`` forwards with backwards, then the gradients of weight and bias."""
    packs = pack(layer, INDEX, dim=dim) if packed else None
    found: list[Tensor | None] = []
    for use in range(uses):
        layer.cut = Cut(index=INDEX, dim=dim, scale=scale, packs=packs, last=use == uses - 1)
        out = layer(inputs(dim, seed=use))
        out.square().sum().backward()
        found.append(out.detach())
    layer.cut = None
    assert packs is None or not packs.waiting
    return [*found, layer.weight.grad, None if layer.bias is None else layer.bias.grad]


def literal(layer: Linear, dim: int, *, uses: int = 3, scale: float = 1.0) -> list[Tensor | None]:
    """The same with the weight sliced by autograd's own indexing."""
    found: list[Tensor | None] = []
    for use in range(uses):
        weight = layer.weight[INDEX] if dim == 0 else layer.weight[:, INDEX]
        bias = layer.bias if layer.bias is None or dim == 1 else layer.bias[INDEX]
        if scale == 1.0:
            out = F.linear(inputs(dim, seed=use), weight, bias)
        else:
            out = F.linear(inputs(dim, seed=use), weight) * scale + (0 if bias is None else bias)
        out.square().sum().backward()
        found.append(out.detach())
    return [*found, layer.weight.grad, None if layer.bias is None else layer.bias.grad]


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("packed", [False, True], ids=["gathered", "packed"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_cut_layer_is_the_slice_of_it(dim: int, bias: bool, packed: bool, scale: float) -> None:
    layer = make_layer(bias=bias)
    twin = copy.deepcopy(layer)
    make_plain(twin)
    assert_close(run(layer, dim, packed=packed, scale=scale), literal(twin, dim, scale=scale), **FP32_SUMS)


def test_another_index_is_seen() -> None:
    layer, twin = make_layer(), make_layer()
    with torch.no_grad():
        twin.weight[1] += 1
    with pytest.raises(AssertionError, match="not close"):
        assert_close(run(layer, 0, packed=True), literal(twin, 0), **FP32_SUMS)


def test_packed_gradients_arrive_with_the_last_backward_alone() -> None:
    layer = make_layer()
    packs = pack(layer, INDEX, dim=0)
    for last in (False, False, True):
        assert layer.weight.grad is None and layer.bias.grad is None
        layer.cut = Cut(index=INDEX, dim=0, packs=packs, last=last)
        layer(inputs(0)).sum().backward()
        assert packs.waiting is not last
    assert layer.weight.grad is not None and layer.bias.grad is not None


def test_a_packed_weight_is_that_of_the_packing() -> None:
    """It is copied once: who changes the weight must pack anew, as every step does."""
    layer = make_layer()
    packs = pack(layer, INDEX, dim=0)
    layer.cut = Cut(index=INDEX, dim=0, packs=packs)
    before = layer(inputs(0)).detach()
    with torch.no_grad():
        layer.weight.zero_()
    assert_close(layer(inputs(0)).detach(), before, **EXACT)


def test_in_bf16_by_autocast_a_cut_layer_is_the_slice_of_it() -> None:
    layer = make_layer()
    twin = copy.deepcopy(layer)
    make_plain(twin)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(run(layer, 1, packed=True, uses=1), literal(twin, 1, uses=1), **EXACT)


def test_a_rescaled_layer_stays_in_autocasts_type() -> None:
    layer = make_layer()
    layer.cut = Cut(index=INDEX, dim=1, scale=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(inputs(1)).dtype == torch.bfloat16


def test_without_a_cut_the_layer_is_torchs() -> None:
    layer = make_layer()
    assert_close(layer(inputs(0)), F.linear(inputs(0), layer.weight, layer.bias), **EXACT)


def test_a_layer_is_torchs_again_and_never_another_object() -> None:
    layer = Linear(7, 6)
    weight = layer.weight
    cuttable = make_cuttable(layer)
    assert cuttable is layer and isinstance(layer, CutLinear)
    layer.cut = Cut(index=INDEX, dim=0)
    make_plain(cuttable)
    assert type(layer) is Linear and layer.weight is weight
    assert set(vars(layer)) == set(vars(Linear(7, 6)))
    assert_close(pickle.loads(pickle.dumps(layer))(inputs(0)), layer(inputs(0)), **EXACT)
