"""Windows of several sequences: each is attended to by itself, and what is padded enters no choice."""

import sys
from fractions import Fraction
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from megatron_sat.data.batch import bounds_of
from megatron_sat.layers import available
from megatron_sat.layers.core_attention import FlashCoreAttention, SDPACoreAttention
from megatron_sat.layers.packed import leave_padding_out, may_look, sequence_numbers
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import batch, layout, positions, tiny_chunks, tiny_config, whole_choices, whole_gradients
from tests.layers.steps import WIDE, attached
from tests.layers.test_core_attention import BATCH, SEQUENCE, build, tensors, written_out, zigzag

SEGMENTS = torch.tensor([[1] * 5 + [2] * 7 + [3] * 4, [1] * 9 + [0] * 7], dtype=torch.int32)
"""Three examples fill the first window; one leaves room in the second."""
HEADS = pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])


def stretches(segments: Tensor) -> list[tuple[int, slice]]:
    """Window and place of each sequence."""
    found = []
    for row, window in enumerate(segments.tolist()):
        edges = [i for i in range(len(window)) if i == 0 or window[i] != window[i - 1]] + [len(window)]
        found += [(row, slice(begin, end)) for begin, end in pairwise(edges)]
    return found


def each_alone(heads: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Output and gradients of a softmax written out over every sequence by itself."""
    *inputs, grad = tensors(heads, groups, dtype)
    output = torch.zeros_like(grad)
    for row, here in stretches(SEGMENTS):
        alone = written_out(*(tensor[here, row : row + 1].double() for tensor in inputs))
        output[here, row : row + 1] = alone.to(dtype)
    output.backward(grad)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def together(
    _: int, heads: int, groups: int, kind: type[SDPACoreAttention], dtype: torch.dtype, segments: Tensor
) -> list[Tensor]:
    layout()
    *inputs, grad = tensors(heads, groups, dtype)
    output = build(kind)(*inputs, bounds_of(segments))
    output.backward(grad)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


@HEADS
def test_sequences_of_a_window_attend_as_each_alone_forward_and_backward(heads: int, groups: int) -> None:
    found = run_ranks(together, 1, heads, groups, SDPACoreAttention, torch.float64, SEGMENTS)[0]
    assert_close(found, each_alone(heads, groups))


@pytest.mark.parametrize("moved", [(0, 5, 1), (1, 8, 0)])
def test_a_boundary_one_token_away_is_told_apart(moved: tuple[int, int, int]) -> None:
    row, place, number = moved
    segments = SEGMENTS.clone()
    segments[row, place] = number
    found = run_ranks(together, 1, 4, 2, SDPACoreAttention, torch.float64, segments)[0]
    with pytest.raises(AssertionError):
        assert_close(found[0], each_alone(4, 2)[0])


def context_parallel(rank: int, heads: int, groups: int) -> list[Tensor]:
    there = layout(cp=2)
    *inputs, grad = tensors(heads, groups)
    parts = [zigzag(t.detach(), rank=there.cp_rank, size=2).requires_grad_() for t in inputs]
    output = build(SDPACoreAttention)(*parts, bounds_of(SEGMENTS))
    output.backward(zigzag(grad, rank=there.cp_rank, size=2))
    return [output.detach(), *(tensor.grad for tensor in parts)]


@HEADS
def test_context_parallel_ranks_see_the_same_boundaries(heads: int, groups: int) -> None:
    whole = each_alone(heads, groups)
    for rank, found in enumerate(run_ranks(context_parallel, 2, heads, groups)):
        assert_close(found, [zigzag(tensor, rank=rank, size=2) for tensor in whole])


def end_to_end(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *, scale: float) -> Tensor:
    """[t, n, d]: SDPA of one sequence after another, in float64."""
    found = []
    for begin, end in pairwise(starts.tolist()):
        parts = (t[begin:end].transpose(0, 1)[None].double() for t in (q, k, v))
        out = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
        found.append(out[0].transpose(0, 1).to(q.dtype))
    return torch.cat(found)


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **how: Any
) -> Tensor:
    assert how["causal"] and how["dropout_p"] == 0.0 and cu_q is cu_k and max_q == max_k == SEQUENCE
    assert cu_q.dtype == torch.int32 and q.dtype == torch.bfloat16
    return end_to_end(q, k, v, cu_q, scale=how["softmax_scale"])


def torchs_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    assert window_size == (-1, 0) and enable_gqa == (q.size(1) != k.size(1)) and max_q == max_k == SEQUENCE
    return end_to_end(q, k, v, cu_q, scale=scale)


def by_kernel(_: int, heads: int, groups: int, kind: type[SDPACoreAttention], dropout: float = 0.0) -> list[Tensor]:
    """With kernels for many lengths, played by SDPA, in bf16."""
    layout()
    attention = build(kind, attention_dropout=dropout)
    if kind is SDPACoreAttention:
        attention.varlen = torchs_varlen
    *inputs, grad = tensors(heads, groups, torch.bfloat16)
    output = attention(*inputs, bounds_of(SEGMENTS))
    output.backward(grad)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


@HEADS
@pytest.mark.parametrize("kind", [SDPACoreAttention, FlashCoreAttention])
def test_kernels_for_many_lengths_are_asked_for_each_sequence_alone(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, kind: type[SDPACoreAttention]
) -> None:
    library = ModuleType("flash_attn")
    library.__dict__.update(__version__="2.8.3", flash_attn_func=pytest.fail, flash_attn_varlen_func=flash_varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    found = run_ranks(by_kernel, 1, heads, groups, kind)[0]
    assert_close(found, each_alone(heads, groups, torch.bfloat16))


def test_torchs_kernel_is_not_asked_to_drop_out() -> None:
    run_ranks(by_kernel, 1, 4, 2, SDPACoreAttention)
    whole = run_ranks(by_kernel, 1, 4, 2, SDPACoreAttention, 0.5)[0]
    assert not torch.allclose(whole[0], run_ranks(by_kernel, 1, 4, 2, SDPACoreAttention)[0][0])


def test_a_torch_without_the_kernel_or_with_an_older_one_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> None: ...

    assert available.torch_attention_varlen(cuda=False) is None
    module = ModuleType("torch.nn.attention.varlen")
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None)
    assert available.torch_attention_varlen(cuda=True) is None
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    module.__dict__["varlen_attn"] = older
    assert available.torch_attention_varlen(cuda=True) is None
    module.__dict__["varlen_attn"] = torchs_varlen
    assert available.torch_attention_varlen(cuda=True) is torchs_varlen
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, kernel in (((7, 5), None), ((9, 0), torchs_varlen)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert available.torch_attention_varlen(cuda=True) is kernel
    assert available.flash_attention_varlen(cuda=False) is None


def test_positions_look_at_what_precedes_them_in_their_own_sequence() -> None:
    numbers = sequence_numbers(bounds_of(SEGMENTS), size=(BATCH, SEQUENCE))
    for first, last in ((0, SEQUENCE), (3, 11)):
        look = may_look(numbers, first=first, last=last)
        for row, position in ((0, 3), (0, 6), (1, 8), (1, 10)):
            seen = look[row, 0, position - first].nonzero().squeeze(1).tolist()
            begin = next(s.start for r, s in stretches(SEGMENTS) if r == row and s.start <= position < s.stop)
            assert seen == list(range(begin, position + 1))


# -- a whole model: windows against examples alone

LENGTHS = ((9, 14, 5), (3, 20))
"""Of the examples in two windows of 32; the rest is padding."""


def windows() -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor, Tensor]]]:
    """A micro-batch, and (tokens, labels, mask) of each of its examples, [1, length]."""
    tokens, labels = batch(3, len(LENGTHS))
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)).round()
    segments = torch.zeros(tokens.shape, dtype=torch.int32)
    alone = []
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate(lengths, start=1):
            here = slice(at, at + length)
            segments[row, here] = number
            alone.append(tuple(t[row : row + 1, here] for t in (tokens, labels, mask)))
            at += length
        mask[row, at:] = 0
    return {"tokens": tokens, "labels": labels, "mask": mask, "bounds": bounds_of(segments)}, alone


def summed(_: int, packed: bool, rate: Fraction) -> tuple[float, dict[str, Tensor]]:
    """The summed loss of what is not masked, and its gradient: in windows, or example by example.

    At a rate above 0 neurons are drawn without looking at tokens, so that both ways draw the same.
    """
    there = layout()
    (chunk,) = tiny_chunks(tiny_config(**WIDE))
    selection = {"importance": "uniform"}
    controller = attached([chunk], selection=selection, there=there, rate=rate, steps=1)
    leave_padding_out([chunk], layout=there)
    whole, alone = windows()
    total = torch.zeros(())
    with controller.step(1):
        if packed:
            losses = chunk(whole["tokens"], positions(2), whole["bounds"], labels=whole["labels"])
            total = (losses * whole["mask"]).sum()
        else:
            for tokens, labels, mask in alone:
                losses = chunk(tokens, positions(1, seq=tokens.size(1)), None, labels=labels)
                total = total + (losses * mask).sum()
        total.backward()
    return float(total), whole_gradients(chunk)


@pytest.mark.parametrize("rate", [Fraction(0), Fraction(1, 2)], ids=["dense", "sparse"])
def test_loss_and_gradients_of_windows_are_those_of_their_examples_alone(rate: Fraction) -> None:
    (loss, grads), (sum_alone, grads_alone) = (
        run_ranks(summed, 1, packed, rate)[0] for packed in (True, False)
    )
    assert_close(loss, sum_alone, rtol=1e-6, atol=0.0)
    assert grads.keys() == grads_alone.keys()
    for name, grad in grads.items():
        scale = float(grads_alone[name].abs().max())
        assert_close(grad, grads_alone[name], rtol=1e-5, atol=2e-6 * scale, msg=lambda text, n=name: f"{n}: {text}")


# -- padding and the choice

SP, CP = {"tp": 2, "sequence_parallel": True}, {"cp": 2}


def chosen(rank: int, importance: str, padded: bool, told: bool, where: dict[str, Any]) -> dict[str, list[int]]:
    """What a step keeps that sees 16 tokens a window, followed by padding or by nothing."""
    sizes = {name: where[name] for name in ("tp", "cp") if name in where}
    there = layout(**sizes)
    (chunk,) = tiny_chunks(tiny_config(**WIDE, sequence_parallel=where.get("sequence_parallel", False)))
    selection = {"importance": importance, "selection": "top-k", "selection_groups": 2}
    controller = attached([chunk], selection=selection, there=there, rate=Fraction(1, 2), steps=1)
    if told:
        leave_padding_out([chunk], layout=there)
    tokens, labels = batch(4, 2)
    segments = torch.ones_like(tokens, dtype=torch.int32)
    segments[:, 16:] = 0
    if padded:
        tokens[:, 16:] = 7
    else:
        tokens, labels, segments = tokens[:, :16], labels[:, :16], segments[:, :16]

    def cut(whole: Tensor) -> Tensor:
        return zigzag(whole.t(), rank=there.cp_rank, size=there.cp_size).t().contiguous() if "cp" in where else whole

    with controller.step(1):
        chunk(cut(tokens), cut(positions(2, seq=tokens.size(1))), bounds_of(segments), labels=cut(labels))
        return whole_choices(controller.selectors)


@pytest.mark.parametrize("where", [SP, CP], ids=["sp", "cp"])
@pytest.mark.parametrize("importance", ["wanda", "maxip", "contribution"])
def test_padding_changes_no_choice(importance: str, where: dict[str, Any]) -> None:
    ranks = where.get("tp", 1) * where.get("cp", 1)
    (unpadded,) = run_ranks(chosen, 1, importance, False, False, {})
    for found in run_ranks(chosen, ranks, importance, True, True, where):
        assert found == unpadded


@pytest.mark.parametrize("importance", ["wanda", "maxip", "contribution"])
def test_padding_that_nobody_tells_of_changes_the_choice(importance: str) -> None:
    assert run_ranks(chosen, 1, importance, True, False, {}) != run_ranks(chosen, 1, importance, False, False, {})


def told_again(_: int) -> list[bool]:
    """Whether the selectors count all tokens: after bounds, once chosen, and in a window without bounds."""
    there = layout()
    (chunk,) = tiny_chunks(tiny_config(**WIDE))
    controller = attached([chunk], selection={}, there=there, rate=Fraction(1, 2), steps=1)
    leave_padding_out([chunk], layout=there)
    whole, _ = windows()
    found = []
    with controller.step(1):
        for bounds in (whole["bounds"], whole["bounds"], None):
            chunk(whole["tokens"], positions(2), bounds, labels=whole["labels"])
            found.append(all(selector.counted is None for selector in controller.selectors))
    return found


def test_only_a_forward_that_chooses_counts_tokens() -> None:
    assert run_ranks(told_again, 1)[0] == [False, True, True]
