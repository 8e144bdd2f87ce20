"""The layers on a GPU: flash kernels take what we hand them, and a cut module is a narrower one there too."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_sat.data.batch import bounds_of
from megatron_sat.distributed import Launch, join, leave
from megatron_sat.layers.available import torch_attention_varlen
from megatron_sat.layers.core_attention import SDPACoreAttention
from megatron_sat.layers.norm import rms_norm
from tests.helpers.tiny import layout, tiny_config
from tests.layers.test_core_attention import HEADS, build, tensors, written_out
from tests.layers.test_packed import SEGMENTS, each_alone
from tests.layers.twins import Masks, attach, attention_masks, attention_pair, mlp_masks, mlp_pair, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """Groups of one in this process: CUDA is initialised with megatron's import, so no rank can be forked."""
    join(Launch(rank=0, world_size=1, local_rank=0), backend="gloo", timeout_minutes=1)
    layout()
    yield
    leave()


BF16 = {"params_dtype": torch.bfloat16, "kv_channels": 8}


def assert_within_rounding(found: Tensor, expected: Tensor) -> None:
    """As far apart, all entries together, as one rounding to bf16 may put them."""
    assert (found - expected).norm() < torch.finfo(torch.bfloat16).eps * expected.norm()


def attend(heads: int, groups: int, last: int) -> Tensor:
    """The last positions of a sequence attend, in bf16, by the flash kernel or not at all."""
    query, key, value = (t.detach().cuda() for t in tensors(heads, groups, torch.bfloat16)[:3])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return build()._attend(query[-last:], key, value).flatten(2).float().cpu()


@HEADS
@pytest.mark.parametrize("last", [16, 5], ids=["square", "lower-right"])
def test_torchs_flash_kernel_takes_grouped_queries_and_lower_right_masks(heads: int, groups: int, last: int) -> None:
    found = attend(heads, groups, last)
    query, key, value = (t.detach().bfloat16().double() for t in tensors(heads, groups)[:3])
    expected = written_out(query, key, value)[-last:].bfloat16().float()
    assert_within_rounding(found, expected)


@pytest.mark.skipif(torch_attention_varlen(cuda=True) is None, reason="needs torch 2.13's varlen_attn")
@HEADS
def test_torchs_kernel_for_many_lengths_attends_to_each_sequence_alone(heads: int, groups: int) -> None:
    """Forward and backward, against a softmax written out; without the kernel a mask would be used."""
    *inputs, grad = [t.detach().cuda() for t in tensors(heads, groups, torch.bfloat16)]
    inputs = [t.requires_grad_() for t in inputs]
    attention = build()
    output = attention(*inputs, bounds_of(SEGMENTS).cuda())
    output.backward(grad)
    found = [output, *(t.grad for t in inputs)]
    for tensor, expected in zip(found, each_alone(heads, groups, torch.bfloat16), strict=True):
        difference = (tensor.float().cpu() - expected.float()).norm()
        assert difference < 4 * torch.finfo(torch.bfloat16).eps * expected.float().norm()


def run_there(module: nn.Module, rest: dict[str, Any]) -> dict[str, Tensor]:
    """Output and gradients of fixed tokens, on the GPU."""
    generator = torch.Generator().manual_seed(11)
    tokens, grad = (torch.randn(12, 2, 64, generator=generator).bfloat16().cuda() for _ in range(2))
    output, _ = module(tokens, **{name: t if t is None else t.cuda() for name, t in rest.items()})
    output.backward(grad)
    return {"output": output} | {name: p.grad for name, p in module.named_parameters()}


def narrower(kind: str) -> list[dict[str, Tensor]]:
    """Ours with half its neurons, and a plain module that has only these."""
    groups = {"num_query_groups": 4}
    pair = attention_pair(**BF16, **groups) if kind == "attention" else mlp_pair(**BF16)
    sparse = pair.sparse.cuda()
    selector = attach(sparse)
    with step(sparse, rate=Fraction(1, 2)):
        ours = run_there(sparse, pair.rest)
        assert selector.choice is not None
        index = selector.choice.index.cpu()
    if kind == "attention":
        masks = attention_masks(index, sparse.config, gqa="group")
        half = {"num_attention_heads": 4, "num_query_groups": 2}
        small = attention_pair(SDPACoreAttention, **BF16, **half).twin
    else:
        masks = mlp_masks(index, sparse.config)
        small = mlp_pair(**BF16, ffn_hidden_size=48).twin
    masks = Masks(*(mask.cuda() for mask in masks))

    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        columns = {"linear_proj.weight", "linear_fc2.weight"}
        rows = {"linear_qkv.weight", "linear_fc1.weight"}
        return (
            {name: t for name, t in tensors.items() if name == "output"}
            | {name: t[:, masks.columns] for name, t in tensors.items() if name in columns}
            | {name: t[masks.rows] for name, t in tensors.items() if name in rows}
        )

    small.load_state_dict(cut(sparse.state_dict()), strict=False)
    plain = run_there(small.cuda(), pair.rest)
    return [{name: t.detach().float().cpu() for name, t in found.items()} for found in (cut(ours), plain)]


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_on_a_gpu_a_sparse_module_is_a_narrower_one(kind: str) -> None:
    ours, small = narrower(kind)
    assert ours.keys() == small.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in small.items())


def normalise() -> list[Tensor]:
    """bf16 on the GPU by whatever is installed, and fp64 written out."""
    norm = rms_norm(cuda=True)(tiny_config(params_dtype=torch.bfloat16), 64, 1e-5).cuda()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return [norm(x.cuda()).float().cpu().detach(), exact.bfloat16().float()]


def test_on_a_gpu_the_norm_takes_its_statistics_in_fp32() -> None:
    assert_within_rounding(*normalise())
