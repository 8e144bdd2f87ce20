"""How Megatron lays out what Hugging Face keeps apart: fused query, key and value, gate over up, the vocabulary.

Legend: ``g`` query groups, ``m`` heads of a group, ``d`` head size, ``f`` MLP width, ``v`` tokens, ``h`` columns (a
bias has none). Megatron's fused projection goes by group, so that tensor parallelism can cut it anywhere between
two groups:

    theirs   q [g m d, h]   k [g d, h]   v [g d, h]          heads in order, those of a group beside each other
    ours     [g (m + 2) d, h]                                per group: its m heads of q, then k, then v

    theirs   gate [f, h]   up [f, h]
    ours     [2 f, h]                                        gate over up; a TP rank takes its part of each half

Both rotate halves of a head's dimensions (Megatron: without --rotary-interleaved), so no rows are permuted. Every
layout is a copy: joining and splitting give the same bits, whatever the type.

The vocabulary is padded at its end, once, at import. A padding row is the mean of all rows: its logit is the mean
of the others' logits, so never above the greatest of them whatever the hidden state is, and its probability never
above 1 / v. A row of zeros would have logit 0, which is above every other where those are negative.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """What the layouts need to know of a model; whole numbers, at least 1."""

    num_query_groups: int
    heads_per_group: int
    head_dim: int
    vocab_size: int
    """Rows of Hugging Face's embedding."""
    padded_vocab_size: int
    """Rows of Megatron's."""

    def __post_init__(self) -> None:
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size must be at least the model's {self.vocab_size} rows, got "
                f"{self.padded_vocab_size}; extend the Hugging Face side first"
            )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which tensors of theirs make one of ours."""

    join: Callable[[Sequence[Tensor], Dimensions], Tensor]
    """Theirs, in the table's order, to ours."""
    split: Callable[[Tensor, Dimensions], list[Tensor]]
    """The inverse."""
    joined: Callable[[Sequence[Shape], Dimensions], Shape]
    """Shape of ours from theirs, without reading a tensor; raises ValueError where they do not fit."""
    parts: Callable[[Shape, Dimensions], list[Shape]]
    """Shapes of theirs from ours."""


def fuse_qkv(parts: Sequence[Tensor], dims: Dimensions) -> Tensor:
    """q [g m d, ...], k [g d, ...], v [g d, ...] -> [g (m + 2) d, ...]."""
    query, key, value = parts
    groups, rest = dims.num_query_groups, query.shape[1:]
    by_group = [part.reshape(groups, -1, dims.head_dim, *rest) for part in (query, key, value)]
    return torch.cat(by_group, dim=1).reshape(-1, *rest)


def split_qkv(fused: Tensor, dims: Dimensions) -> list[Tensor]:
    """[g (m + 2) d, ...] -> q [g m d, ...], k [g d, ...], v [g d, ...]."""
    rest = fused.shape[1:]
    by_group = fused.reshape(dims.num_query_groups, dims.heads_per_group + 2, dims.head_dim, *rest)
    parts = by_group.split([dims.heads_per_group, 1, 1], dim=1)
    return [part.reshape(-1, *rest) for part in parts]


def pad_vocabulary(rows: Tensor, *, padded: int) -> Tensor:
    """[v, h] -> [padded, h]: each row that is added is the mean, in fp32, of the rows there are."""
    missing = padded - len(rows)
    if not missing:
        return rows
    mean = torch.zeros(rows.shape[1:], dtype=torch.float64)
    for part in rows.split(8192):  # no fp32 copy of a whole vocabulary
        mean += part.sum(dim=0, dtype=torch.float64)
    filling = (mean / len(rows)).to(rows.dtype)
    return torch.cat([rows, filling.expand(missing, *rows.shape[1:])])


def _joined_qkv(shapes: Sequence[Shape], dims: Dimensions) -> Shape:
    keys = dims.num_query_groups * dims.head_dim
    rest = shapes[0][1:]
    wanted = [(keys * dims.heads_per_group, *rest), (keys, *rest), (keys, *rest)]
    if list(shapes) != wanted:
        raise ValueError(f"query, key and value must be {wanted}, got {list(shapes)}")
    return (keys * (dims.heads_per_group + 2), *rest)


def _joined_gate_up(shapes: Sequence[Shape], _: Dimensions) -> Shape:
    gate, up = shapes
    if gate != up:
        raise ValueError(f"gate and up must have one shape, got {gate} and {up}")
    return (2 * gate[0], *gate[1:])


def _joined_vocabulary(shapes: Sequence[Shape], dims: Dimensions) -> Shape:
    if shapes[0][0] != dims.vocab_size:
        raise ValueError(f"the vocabulary must have {dims.vocab_size} rows, got {shapes[0][0]}")
    return (dims.padded_vocab_size, *shapes[0][1:])


def _parts_of_qkv(shape: Shape, dims: Dimensions) -> list[Shape]:
    keys = (dims.num_query_groups * dims.head_dim, *shape[1:])
    return [(keys[0] * dims.heads_per_group, *shape[1:]), keys, keys]


LAYOUTS: dict[str, Layout] = {
    "plain": Layout(
        join=lambda parts, dims: parts[0],
        split=lambda ours, dims: [ours],
        joined=lambda shapes, dims: shapes[0],
        parts=lambda shape, dims: [shape],
    ),
    "qkv": Layout(join=fuse_qkv, split=split_qkv, joined=_joined_qkv, parts=_parts_of_qkv),
    "gate_up": Layout(
        join=lambda parts, dims: torch.cat(list(parts)),
        split=lambda ours, dims: list(ours.chunk(2)),
        joined=_joined_gate_up,
        parts=lambda shape, dims: [(shape[0] // 2, *shape[1:])] * 2,
    ),
    "vocabulary": Layout(
        join=lambda parts, dims: pad_vocabulary(parts[0], padded=dims.padded_vocab_size),
        split=lambda ours, dims: [ours[: dims.vocab_size]],
        joined=_joined_vocabulary,
        parts=lambda shape, dims: [(dims.vocab_size, *shape[1:])],
    ),
}
"""By the name that a row of `hf_names.NAMES` gives."""
