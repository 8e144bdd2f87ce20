"""Layouts against literal loops over heads and groups, there and back bit for bit."""

import pytest
import torch

from megatron_sat.checkpoint.hf_layout import LAYOUTS, Dimensions, fuse_qkv, pad_vocabulary, split_qkv

DIMS = Dimensions(num_query_groups=3, heads_per_group=2, head_dim=4, vocab_size=10, padded_vocab_size=16)


def _parts(*rest: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(rows, *rest, generator=generator).to(dtype) for rows in (24, 12, 12)]


def _fused_by_a_loop(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Row by row: the heads of a group, its key, its value, then the next group."""
    found = []
    for group in range(3):
        for head in (2 * group, 2 * group + 1):
            found += [query[head * 4 + i] for i in range(4)]
        found += [key[group * 4 + i] for i in range(4)] + [value[group * 4 + i] for i in range(4)]
    return torch.stack(found)


@pytest.mark.parametrize("rest", [(5,), ()], ids=["weight", "bias"])
def test_query_key_and_value_are_fused_group_by_group(rest):
    parts = _parts(*rest)
    assert torch.equal(fuse_qkv(parts, DIMS), _fused_by_a_loop(*parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["qkv", "gate_up", "plain", "vocabulary"])
def test_every_layout_comes_back_bit_for_bit(layout, dtype):
    one = LAYOUTS[layout]
    parts = {"qkv": _parts(5, dtype=dtype), "gate_up": _parts(5, dtype=dtype)[1:], "plain": _parts(5, dtype=dtype)[:1]}
    given = parts.get(layout, [_parts(5, dtype=dtype)[0][:10]])

    ours = one.join(given, DIMS)
    back = one.split(ours, DIMS)

    assert tuple(ours.shape) == one.joined([tuple(part.shape) for part in given], DIMS)
    assert [tuple(part.shape) for part in back] == one.parts(tuple(ours.shape), DIMS)
    assert all(torch.equal(now, before) for now, before in zip(back, given, strict=True))


def test_a_fused_projection_split_for_another_number_of_groups_is_another():
    parts = _parts(5)
    other = Dimensions(num_query_groups=6, heads_per_group=1, head_dim=4, vocab_size=1, padded_vocab_size=1)
    fused = torch.cat([fuse_qkv(parts, DIMS), torch.zeros(24, 5)])  # as long as 6 groups of 1 head are
    assert not torch.equal(split_qkv(fused, other)[0], parts[0])


def test_padding_rows_are_the_mean_of_the_others():
    rows = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    padded = pad_vocabulary(rows, padded=16)
    assert torch.equal(padded[:10], rows)
    assert torch.equal(padded[10:], rows.double().mean(0).to(torch.bfloat16).expand(6, 6))


def test_a_padding_row_is_never_likeliest_where_a_row_of_zeros_would_be():
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(10, 6, generator=generator)
    states = torch.randn(2000, 6, generator=generator)
    rows[:, 0], states[:, 0] = 2.0, -3.0  # every logit has -6 in it

    logits = states @ pad_vocabulary(rows, padded=16).T
    zeros = states @ torch.cat([rows, torch.zeros(6, 6)]).T

    assert (logits.argmax(-1) < 10).all()
    assert (logits.softmax(-1)[:, 10:].sum(-1) <= 6 / 16 + 1e-6).all()
    assert (zeros.argmax(-1) >= 10).any()


@pytest.mark.parametrize(
    "layout, shapes, text",
    [
        ("qkv", [(24, 5), (12, 5), (8, 5)], "query, key and value must be"),
        ("gate_up", [(12, 5), (8, 5)], "gate and up must have one shape"),
        ("vocabulary", [(11, 5)], "the vocabulary must have 10 rows, got 11"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_a_tensor_is_read(layout, shapes, text):
    with pytest.raises(ValueError, match=text):
        LAYOUTS[layout].joined(shapes, DIMS)


def test_fewer_rows_than_tokens_are_refused():
    with pytest.raises(ValueError, match="padded_vocab_size must be at least the model's 10 rows, got 8"):
        Dimensions(num_query_groups=1, heads_per_group=1, head_dim=1, vocab_size=10, padded_vocab_size=8)
