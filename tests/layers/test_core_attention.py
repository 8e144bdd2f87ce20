"""Core attention against a softmax written out: SDPA, flash-attn (played by SDPA), context parallelism."""

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.testing import assert_close

from megatron_sat.layers.core_attention import FlashCoreAttention, SDPACoreAttention, core_attention
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout, tiny_config

SEQUENCE, BATCH, SIZE = 16, 2, 8
HEADS = pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt(d), causal) v, head after head: [s, b, k, d] and [s, b, g', d] to [s, b, k d]."""
    group = query.size(2) // key.size(2)
    heads = []
    for head in range(query.size(2)):
        q, k, v = query[:, :, head], key[:, :, head // group], value[:, :, head // group]
        scores = torch.einsum("qbd,kbd->bqk", q, k) / math.sqrt(query.size(-1))
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        heads.append(torch.einsum("bqk,kbd->qbd", scores.masked_fill(later, -math.inf).softmax(-1), v))
    return torch.cat(heads, dim=-1)


def tensors(heads: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """query, key, value and the gradient of the output, the same on every rank."""
    generator = torch.Generator().manual_seed(2)
    counts = (heads, groups, groups, heads)
    made = [torch.randn(SEQUENCE, BATCH, count, SIZE, generator=generator).to(dtype) for count in counts]
    made[3] = made[3].flatten(2)
    return [tensor.requires_grad_(i < 3) for i, tensor in enumerate(made)]


def build(kind: type[SDPACoreAttention] = SDPACoreAttention, **changes: Any) -> SDPACoreAttention:
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    config = tiny_config(kv_channels=SIZE, **changes)
    return kind(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def forward_backward(
    _: int, heads: int, groups: int, kind: type[SDPACoreAttention], dtype: torch.dtype
) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    layout()
    *inputs, grad = tensors(heads, groups, dtype)
    output = build(kind)(*inputs, None)
    output.backward(grad)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def expected(heads: int, groups: int) -> list[Tensor]:
    *inputs, grad = tensors(heads, groups)
    output = written_out(*inputs)
    output.backward(grad)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


@HEADS
def test_sdpa_equals_the_softmax_written_out_forward_and_backward(heads: int, groups: int) -> None:
    found = run_ranks(forward_backward, 1, heads, groups, SDPACoreAttention, torch.float64)[0]
    assert_close(found, expected(heads, groups))


def test_the_softmax_of_other_heads_is_told_apart() -> None:
    found = run_ranks(forward_backward, 1, 4, 2, SDPACoreAttention, torch.float64)[0]
    *inputs, _ = tensors(4, 2)
    with pytest.raises(AssertionError):
        assert_close(found[0], written_out(inputs[0], inputs[1].flip(2), inputs[2]))


def zigzag(whole: Tensor, *, rank: int, size: int) -> Tensor:
    """The two chunks of a sequence [s, ...] that a context-parallel rank holds."""
    chunks = whole.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def context_parallel(
    rank: int, heads: int, groups: int, kind: type[SDPACoreAttention], dtype: torch.dtype
) -> list[Tensor]:
    """This rank's part of the output and of the gradients."""
    there = layout(cp=2)
    *inputs, grad = tensors(heads, groups, dtype)
    parts = [zigzag(t.detach(), rank=there.cp_rank, size=2).requires_grad_() for t in inputs]
    output = build(kind)(*parts, None)
    output.backward(zigzag(grad, rank=there.cp_rank, size=2))
    return [output.detach(), *(tensor.grad for tensor in parts)]


@HEADS
def test_two_context_parallel_ranks_equal_one(heads: int, groups: int) -> None:
    whole = expected(heads, groups)
    ranks = run_ranks(context_parallel, 2, heads, groups, SDPACoreAttention, torch.float64)
    for rank, found in enumerate(ranks):
        assert_close(found, [zigzag(tensor, rank=rank, size=2) for tensor in whole])


def test_the_other_ranks_part_is_told_apart() -> None:
    found = run_ranks(context_parallel, 2, 4, 2, SDPACoreAttention, torch.float64)[0]
    with pytest.raises(AssertionError):
        assert_close(found[0], zigzag(expected(4, 2)[0], rank=1, size=2))


def dropped(rank: int, tp: int, training: bool) -> Tensor:
    """The output under dropout, for inputs and seeds that are the same on every rank."""
    layout(tp=tp)
    attention = build(attention_dropout=0.5).train(training)
    torch.manual_seed(9)
    return attention(*tensors(4, 2)[:3], None).detach()


def test_dropout_differs_between_tensor_parallel_ranks_whose_heads_differ() -> None:
    first, second = run_ranks(dropped, 2, 2, True)
    assert not torch.equal(first, second)


def test_there_is_dropout_in_training_and_none_in_evaluation() -> None:
    training, evaluation = (run_ranks(dropped, 1, 1, mode)[0] for mode in (True, False))
    assert torch.equal(evaluation, run_ranks(forward_backward, 1, 4, 2, SDPACoreAttention, torch.float64)[0][0])
    assert not torch.allclose(training, evaluation)


def refused(_: int, mask: AttnMaskType, changes: dict[str, Any], packed: object) -> None:
    layout()
    attention = SDPACoreAttention(tiny_config(kv_channels=SIZE, **changes), 1, mask, "self")
    attention(*tensors(4, 2)[:3], None, packed_seq_params=packed)


@pytest.mark.parametrize(
    "mask, changes, packed, text",
    [
        (AttnMaskType.padding, {}, None, "must be causal, got AttnMaskType.padding"),
        (
            AttnMaskType.causal,
            {"window_size": (8, 0)},
            None,
            "--window-size and --softmax-type must be unset",
        ),
        (AttnMaskType.causal, {"softmax_type": "off-by-one"}, None, "got None and off-by-one"),
        (AttnMaskType.causal, {}, "packs", "packed_seq_params must be None for SDPACoreAttention, got str"),
    ],
    ids=["mask", "window", "sink", "packed"],
)
def test_what_it_cannot_compute_is_refused_by_name(
    mask: AttnMaskType, changes: dict[str, Any], packed: object, text: str
) -> None:
    with pytest.raises(RuntimeError, match=f"ValueError: .*{text}"):
        run_ranks(refused, 1, mask, changes, packed)


def play_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a flash_attn in place that computes [b, s, n, d] as the library does, by SDPA."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool
    ) -> Tensor:
        assert q.dtype == torch.bfloat16 and causal
        mask = causal_lower_right(q.size(1), k.size(1))
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(
            *heads_first, attn_mask=mask, dropout_p=dropout_p, scale=softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    library = ModuleType("flash_attn")
    library.__dict__.update(__version__="2.8.3", flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", library)


@HEADS
def test_flash_attention_gets_its_own_layout_and_gives_what_sdpa_gives(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: int
) -> None:
    play_flash_attention(monkeypatch)
    flash, sdpa = (
        run_ranks(forward_backward, 1, heads, groups, kind, torch.bfloat16)[0]
        for kind in (core_attention(cuda=True), SDPACoreAttention)
    )
    assert_close(flash, sdpa)


def test_flash_attention_equals_sdpa_under_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    play_flash_attention(monkeypatch)
    flash, sdpa = (
        run_ranks(context_parallel, 2, 4, 2, kind, torch.bfloat16) for kind in (FlashCoreAttention, SDPACoreAttention)
    )
    assert_close(flash, sdpa)


def test_flash_attention_leaves_fp32_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    play_flash_attention(monkeypatch)
    found = run_ranks(forward_backward, 1, 4, 2, FlashCoreAttention, torch.float64)[0]
    assert_close(found, expected(4, 2))


def test_flash_attention_is_chosen_where_it_is_installed_and_a_gpu_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without = core_attention(cuda=True)
    play_flash_attention(monkeypatch)
    assert (without, core_attention(cuda=False)) == (SDPACoreAttention, SDPACoreAttention)
    assert core_attention(cuda=True) is FlashCoreAttention


def without_library(_: int) -> None:
    layout()
    build(FlashCoreAttention)


def test_flash_attention_that_is_not_installed_is_refused_with_the_way_out() -> None:
    with pytest.raises(RuntimeError, match="ValueError: flash-attn must be installed .*, or use SDPACoreAttention"):
        run_ranks(without_library, 1)


def test_attention_has_nothing_to_checkpoint() -> None:
    assert SDPACoreAttention.sharded_state_dict(None) == {}
