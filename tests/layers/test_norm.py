"""RMSNorm by torch, and by apex and Transformer Engine, which stand-ins play here."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from megatron_sat.layers.norm import ApexRMSNorm, CompiledNorm, RMSNorm, rms_norm
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout, tiny_config

WIDTH, EPS = 64, 1e-5


def written_out(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def play_apex(monkeypatch: pytest.MonkeyPatch, *, saw: list[bool] | None = None) -> None:
    """apex with its compiled extension; ``saw`` collects whether memory was to be saved."""

    def fused(x: Tensor, weight: Tensor, shape: Any, eps: float, memory_efficient: bool) -> Tensor:
        if saw is not None:
            saw.append(memory_efficient)
        return torch.nn.functional.rms_norm(x, shape, weight, eps)

    normalization = ModuleType("apex.normalization.fused_layer_norm")
    normalization.__dict__.update(fused_rms_norm_affine=fused)
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


def play_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    library, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    library.__dict__.update(__version__="2.9.0", pytorch=pytorch)
    pytorch.__dict__.update(RMSNorm=EngineNorm)
    monkeypatch.setitem(sys.modules, "transformer_engine", library)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)


PLAYERS = {"torch": lambda monkeypatch: None, "apex": play_apex, "te": play_transformer_engine}


def build(kind: type[nn.Module], **changes: Any) -> nn.Module:
    return kind(tiny_config(**changes), WIDTH, EPS)


def forward_backward(_: int, cuda: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[str], str]:
    """Output and gradients of input and weight; the names in the state; the class."""
    layout()
    norm = build(rms_norm(cuda=cuda), params_dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    norm.weight.data.copy_(torch.rand(WIDTH, generator=generator) + 0.5)
    x = torch.randn(5, 2, WIDTH, generator=generator).to(dtype).requires_grad_()
    output = norm(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, norm.weight.grad], list(norm.state_dict()), type(norm).__name__


@pytest.mark.parametrize("player", PLAYERS)
def test_every_norm_equals_the_mean_square_written_out(monkeypatch: pytest.MonkeyPatch, player: str) -> None:
    PLAYERS[player](monkeypatch)
    found, _, name = run_ranks(forward_backward, 1, True, torch.float64)[0]
    generator = torch.Generator().manual_seed(4)
    weight = (torch.rand(WIDTH, generator=generator) + 0.5).double().requires_grad_()
    x = torch.randn(5, 2, WIDTH, generator=generator).double().requires_grad_()
    output = written_out(x, weight)
    output.square().sum().backward()
    assert name == {"torch": "RMSNorm", "apex": "ApexRMSNorm", "te": "TransformerEngineRMSNorm"}[player]
    assert_close(found, [output.detach(), x.grad, weight.grad])


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


def test_statistics_of_bf16_are_taken_in_fp32() -> None:
    (output, *_), _, _ = run_ranks(forward_backward, 1, False, torch.bfloat16)[0]
    generator = torch.Generator().manual_seed(4)
    weight = (torch.rand(WIDTH, generator=generator) + 0.5).bfloat16().float()
    x = torch.randn(5, 2, WIDTH, generator=generator).bfloat16().float()
    assert_close(output, written_out(x, weight).bfloat16())


@pytest.mark.parametrize("player", PLAYERS)
def test_a_checkpoint_holds_one_weight_whoever_computes(monkeypatch: pytest.MonkeyPatch, player: str) -> None:
    PLAYERS[player](monkeypatch)
    assert run_ranks(forward_backward, 1, True, torch.float32)[0][1] == ["weight"]


def loads(_: int) -> bool:
    """A state of torch's norm, loaded strictly into Transformer Engine's."""
    layout()
    mine, theirs = build(rms_norm(cuda=False)), build(rms_norm(cuda=True))
    nn.init.normal_(mine.weight)
    theirs.load_state_dict(mine.state_dict())
    return torch.equal(mine.weight, theirs.weight)


def test_a_checkpoint_moves_between_torch_and_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    play_transformer_engine(monkeypatch)
    assert run_ranks(loads, 1)[0]


def marks(_: int) -> list[bool]:
    """The mark on the weight, without and with sequence parallelism."""
    layout(tp=2)
    return [build(rms_norm(cuda=True), sequence_parallel=sp).weight.sequence_parallel for sp in (False, True)]


@pytest.mark.parametrize("player", PLAYERS)
def test_the_weight_is_marked_under_sequence_parallelism(monkeypatch: pytest.MonkeyPatch, player: str) -> None:
    PLAYERS[player](monkeypatch)
    assert run_ranks(marks, 2) == [[False, True]] * 2


def test_without_a_gpu_torch_computes_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    play_apex(monkeypatch)
    play_transformer_engine(monkeypatch)
    assert rms_norm(cuda=False) is RMSNorm


def saved_memory(_: int, saw: list[bool]) -> list[bool]:
    layout()
    for memory_efficient in (False, True):
        kind = rms_norm(cuda=True, memory_efficient=memory_efficient)
        build(kind, memory_efficient_layer_norm=memory_efficient)(torch.randn(2, WIDTH))
    return saw


def test_apex_saves_memory_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    saw: list[bool] = []
    play_apex(monkeypatch, saw=saw)
    assert run_ranks(saved_memory, 1, saw)[0] == [False, True]


def test_saving_memory_without_apex_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_efficient_layer_norm needs apex' norm"):
        rms_norm(cuda=True, memory_efficient=True)


def without_apex(_: int) -> None:
    layout()
    build(ApexRMSNorm)


def test_apex_that_is_not_installed_is_refused_with_the_way_out() -> None:
    with pytest.raises(RuntimeError, match="ValueError: apex must be installed .*, or use RMSNorm"):
        run_ranks(without_apex, 1)
