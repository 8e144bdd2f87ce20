"""Local and strided attention against softmax written out, forward and backward, with groups and with bounds."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_sat.layers.core_attention import SDPACoreAttention, hybrid_mask
from megatron_sat.layers.packed import may_look
from megatron_sat.model.flops import hybrid_share
from tests.helpers.tolerances import FP32_SUMS

LENGTH, BATCH, HEADS, GROUPS, SIZE = 13, 2, 4, 2, 8


def attention(stride: int | None) -> SDPACoreAttention:
    """Without a configuration: what `_attend` reads is set by hand."""
    found = SDPACoreAttention.__new__(SDPACoreAttention)
    torch.nn.Module.__init__(found)
    found.dropout, found.scale, found.hybrid_stride = 0.0, SIZE**-0.5, stride
    return found


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(LENGTH, BATCH, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def written_out(q: Tensor, k: Tensor, v: Tensor, *, stride: int, numbers: Tensor | None) -> Tensor:
    """Place by place: a token looks at the last ``stride`` tokens and at every ``stride``-th one before."""
    out = []
    for place in range(LENGTH):
        rows = []
        for sample in range(BATCH):
            looks = [at for at in range(place + 1) if place - at < stride or (place - at) % stride == 0]
            if numbers is not None:
                looks = [at for at in looks if numbers[sample, at] == numbers[sample, place]]
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = k[looks, sample, group] @ q[place, sample, head] * SIZE**-0.5
                rows.append(scores.softmax(0) @ v[looks, sample, group])
        out.append(torch.stack(rows).view(BATCH, HEADS, SIZE))
    return torch.stack(out)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("stride", [1, 3, 5, 20])
def test_hybrid_attention_is_softmax_over_the_places_it_names(stride: int, bounded: bool) -> None:
    numbers = torch.tensor([[0] * 6 + [1] * 7, [0] * 13]) if bounded else None
    mine, literal = tensors(), tensors()
    found = attention(stride)._attend(*mine, numbers)
    expected = written_out(*literal, stride=stride, numbers=numbers)
    assert_close(found, expected, **FP32_SUMS)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    for each in (found, expected):
        (each * weight).sum().backward()
    for one, other in zip(mine, literal, strict=True):
        assert_close(one.grad, other.grad, **FP32_SUMS)


def test_dense_attention_is_told_apart_and_is_what_a_long_stride_gives() -> None:
    dense = attention(None)._attend(*tensors())
    assert_close(attention(LENGTH)._attend(*tensors()), dense, **FP32_SUMS)
    assert (attention(3)._attend(*tensors()) - dense).abs().max() > 1e-2


def test_the_last_queries_of_a_longer_sequence_see_what_they_see_in_the_whole() -> None:
    """As context parallelism cuts it."""
    whole = hybrid_mask(LENGTH, LENGTH, stride=4, device=torch.device("cpu"))
    assert torch.equal(hybrid_mask(5, LENGTH, stride=4, device=torch.device("cpu")), whole[-5:])
    one = may_look(torch.zeros(1, LENGTH), first=0, last=LENGTH)
    assert not (whole & ~one).any(), "nobody looks ahead"


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (13, 3), (16, 16), (16, 40), (40, 7)])
def test_its_share_of_the_operations_is_counted_place_by_place(length: int, stride: int) -> None:
    mask = hybrid_mask(length, length, stride=stride, device=torch.device("cpu"))
    assert hybrid_share(length, stride=stride) == Fraction(int(mask.sum()), length * (length + 1) // 2)
