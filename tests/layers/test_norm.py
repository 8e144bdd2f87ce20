"""RMSNorm and LayerNorm by torch, and by apex and Transformer Engine, which stand-ins play here."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from megatron_sat.layers.norm import (
    ApexLayerNorm,
    ApexRMSNorm,
    CompiledNorm,
    LayerNorm,
    RMSNorm,
    layer_norm,
    rms_norm,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout, tiny_config

WIDTH, EPS = 64, 1e-5
KINDS: dict[str, Any] = {"RMSNorm": rms_norm, "LayerNorm": layer_norm}


def written_out(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """RMSNorm; with a bias LayerNorm."""
    less = x if bias is None else x - x.mean(-1, keepdim=True)
    normed = less / (less.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return normed if bias is None else normed + bias


def play_apex(monkeypatch: pytest.MonkeyPatch, *, saw: list[bool] | None = None) -> None:
    """apex with its compiled extension; ``saw`` collects whether memory was to be saved."""

    def fused(x: Tensor, weight: Tensor, shape: Any, eps: float, memory_efficient: bool) -> Tensor:
        if saw is not None:
            saw.append(memory_efficient)
        return torch.nn.functional.rms_norm(x, shape, weight, eps)

    normalization = ModuleType("apex.normalization.fused_layer_norm")
    def fused_layer(x: Tensor, weight: Tensor, bias: Tensor, shape: Any, eps: float, memory_efficient: bool) -> Tensor:
        if saw is not None:
            saw.append(memory_efficient)
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    normalization.__dict__.update(fused_rms_norm_affine=fused, fused_layer_norm_affine=fused_layer)
    for module in (ModuleType("apex"), ModuleType("apex.normalization"), normalization):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", ModuleType("fused_layer_norm_cuda"))


class EngineNorm(nn.Module):
    """Transformer Engine's RMSNorm as of 2.x, in what we use of it: arguments, weight, and an extra state."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float,
        sequence_parallel: bool,
        params_dtype: torch.dtype,
        device: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        assert not state.numel()


class EngineLayerNorm(EngineNorm):
    """Its LayerNorm."""

    def __init__(self, normalized_shape: int, *, device: Any, params_dtype: torch.dtype, **others: Any) -> None:
        super().__init__(normalized_shape, device=device, params_dtype=params_dtype, **others)
        self.bias = nn.Parameter(torch.zeros(normalized_shape, dtype=params_dtype, device=device))
        self.bias.sequence_parallel = others["sequence_parallel"]

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def play_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    library, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    library.__dict__.update(__version__="2.9.0", pytorch=pytorch)
    pytorch.__dict__.update(RMSNorm=EngineNorm, LayerNorm=EngineLayerNorm)
    monkeypatch.setitem(sys.modules, "transformer_engine", library)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)


PLAYERS = {"torch": lambda monkeypatch: None, "apex": play_apex, "te": play_transformer_engine}


def build(kind: type[nn.Module], **changes: Any) -> Any:
    return kind(tiny_config(**changes), WIDTH, EPS)


def material(kind: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """x [5, 2, h], and weight, for LayerNorm also bias, [h]."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.rand(WIDTH, generator=generator) + 0.5
    x = torch.randn(5, 2, WIDTH, generator=generator) + 0.3
    parameters = [weight] if kind == "RMSNorm" else [weight, torch.rand(WIDTH, generator=generator)]
    return x.to(dtype), [parameter.to(dtype) for parameter in parameters]


def forward_backward(_: int, kind: str, cuda: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[str], str]:
    """Output and gradients of input and parameters; the names in the state; the class."""
    layout()
    norm = build(KINDS[kind](cuda=cuda), params_dtype=dtype)
    x, values = material(kind, dtype)
    for parameter, value in zip(norm.parameters(), values, strict=True):
        parameter.data.copy_(value)
    output = norm(x.requires_grad_())
    output.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in norm.parameters())]
    return [output.detach(), *gradients], list(norm.state_dict()), type(norm).__name__


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("player", PLAYERS)
def test_every_norm_equals_its_means_written_out(monkeypatch: pytest.MonkeyPatch, player: str, kind: str) -> None:
    PLAYERS[player](monkeypatch)
    found, _, name = run_ranks(forward_backward, 1, kind, True, torch.float64)[0]
    x, parameters = material(kind, torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, *parameters)]
    output = written_out(*leaves)
    output.square().sum().backward()
    assert name == {"torch": kind, "apex": f"Apex{kind}", "te": "TransformerEngineNorm"}[player]
    assert_close(found, [output.detach(), *(leaf.grad for leaf in leaves)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(5, 3, WIDTH), (4, 2, 3, WIDTH)])
def test_what_is_compiled_on_a_gpu_equals_torchs_norm(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    """Forward and backward; here it is not compiled."""
    torch.manual_seed(3)
    x, weight, grad = torch.randn(shape), 1 + 0.1 * torch.randn(WIDTH), torch.randn(shape)
    found, expected = [], []
    for norm, results in ((CompiledNorm.apply, found), (None, expected)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        output = norm(*leaves, EPS) if norm else nn.functional.rms_norm(leaves[0], (WIDTH,), leaves[1], EPS)
        results += [output, *torch.autograd.grad(output, leaves, grad.to(dtype))]
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert_close(mine.double(), true.double(), rtol=tolerance, atol=tolerance * float(true.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_bf16_are_taken_in_fp32(kind: str) -> None:
    (output, *_), _, _ = run_ranks(forward_backward, 1, kind, False, torch.bfloat16)[0]
    x, parameters = material(kind, torch.bfloat16)
    assert_close(output, written_out(x.float(), *(parameter.float() for parameter in parameters)).bfloat16())


@pytest.mark.parametrize("player", PLAYERS)
def test_a_checkpoint_holds_one_weight_whoever_computes(monkeypatch: pytest.MonkeyPatch, player: str) -> None:
    PLAYERS[player](monkeypatch)
    names = {kind: run_ranks(forward_backward, 1, kind, True, torch.float32)[0][1] for kind in KINDS}
    assert names == {"RMSNorm": ["weight"], "LayerNorm": ["weight", "bias"]}


def loads(_: int, kind: str) -> bool:
    """A state of torch's norm, loaded strictly into Transformer Engine's."""
    layout()
    mine, theirs = (build(KINDS[kind](cuda=cuda)) for cuda in (False, True))
    for parameter in mine.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(mine.state_dict())
    return all(torch.equal(one, other) for one, other in zip(mine.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_moves_between_torch_and_transformer_engine(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    play_transformer_engine(monkeypatch)
    assert run_ranks(loads, 1, kind)[0]


def marks(_: int, kind: str) -> list[set[bool]]:
    """The marks on the parameters, without and with sequence parallelism."""
    layout(tp=2)
    norms = [build(KINDS[kind](cuda=True), sequence_parallel=sp) for sp in (False, True)]
    return [{parameter.sequence_parallel for parameter in norm.parameters()} for norm in norms]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("player", PLAYERS)
def test_parameters_are_marked_under_sequence_parallelism(
    monkeypatch: pytest.MonkeyPatch, player: str, kind: str
) -> None:
    PLAYERS[player](monkeypatch)
    assert run_ranks(marks, 2, kind) == [[{False}, {True}]] * 2


def test_without_a_gpu_torch_computes_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    play_apex(monkeypatch)
    play_transformer_engine(monkeypatch)
    assert (rms_norm(cuda=False), layer_norm(cuda=False)) == (RMSNorm, LayerNorm)


def saved_memory(_: int, choose: str, saw: list[bool]) -> list[bool]:
    layout()
    for memory_efficient in (False, True):
        kind = KINDS[choose](cuda=True, memory_efficient=memory_efficient)
        build(kind, memory_efficient_layer_norm=memory_efficient)(torch.randn(2, WIDTH))
    return saw


@pytest.mark.parametrize("kind", KINDS)
def test_apex_saves_memory_where_asked(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    saw: list[bool] = []
    play_apex(monkeypatch, saw=saw)
    assert run_ranks(saved_memory, 1, kind, saw)[0] == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_saving_memory_without_apex_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="memory_efficient_layer_norm needs apex' norm"):
        KINDS[kind](cuda=True, memory_efficient=True)


def without_apex(_: int, kind: type[nn.Module]) -> None:
    layout()
    build(kind)


@pytest.mark.parametrize("kind", [ApexRMSNorm, ApexLayerNorm])
def test_apex_that_is_not_installed_is_refused_with_the_way_out(kind: type[nn.Module]) -> None:
    name = kind.__name__
    said = f"ValueError: apex must be installed with its CUDA extensions for {name}, .*, or use {name[4:]}"
    with pytest.raises(RuntimeError, match=said):
        run_ranks(without_apex, 1, kind)
