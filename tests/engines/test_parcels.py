"""Parcels: what is packed comes back to its place, nothing else moves, and shards cut nothing off."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from megatron_sat.engines.filled import FilledEntries
from megatron_sat.engines.parcels import Parcel, Section, bundles, pack, sections_of, unpack

SHAPES = ((6, 5), (7,), (4, 9), (3, 3))


def in_buffer(*, padding: int = 3, owners: int = 1) -> tuple[Tensor, list[Parameter]]:
    """Parameters whose gradients lie in one buffer as DDP's do: the last one first, with padding between them."""
    parameters = [Parameter(torch.zeros(shape)) for shape in SHAPES]
    ends = sum(parameter.numel() + padding for parameter in parameters)
    whole = torch.arange(1.0, 11 + ends + -ends % owners)
    buffer, at = whole[10:], 0  # a bucket begins somewhere in its buffer
    for parameter in reversed(parameters):
        parameter.main_grad = buffer[at : at + parameter.numel()].view(parameter.shape)  # type: ignore[attr-defined]
        at += parameter.numel() + padding
    return buffer, parameters


def gradient(parameter: Parameter) -> Tensor:
    return parameter.main_grad  # type: ignore[attr-defined, no-any-return]


def packed_of(bundle: list[Parcel]) -> Tensor:
    packed = torch.full((sum(parcel.numel for parcel in bundle),), torch.nan)
    pack(bundle, packed)
    return packed


def naive(parameter: Parameter, dim: int, index: Tensor) -> Tensor:
    """A mask over a parameter's filled entries, row by row."""
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    for at in index.tolist():
        mask.select(dim, at)[...] = True
    return mask


@given(
    owners=st.integers(1, 5),
    most=st.integers(1, 40),
    chosen=st.lists(st.tuples(st.integers(0, 1), st.sets(st.integers(0, 8))), min_size=4, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_what_travels_is_exactly_what_is_filled_whatever_is_cut(
    owners: int, most: int, chosen: list[tuple[int, set[int]]]
) -> None:
    buffer, parameters = in_buffer(owners=owners)
    shards = sections_of(buffer, parameters, owners=owners)
    filled = FilledEntries(section for shard in shards for section in shard)
    expected = torch.zeros(buffer.numel(), dtype=torch.bool)
    for number, (parameter, (dim, rows)) in enumerate(zip(parameters, chosen, strict=True)):
        at = gradient(parameter).storage_offset() - buffer.storage_offset()
        dim = min(dim, parameter.dim() - 1)
        index = torch.tensor(sorted(row for row in rows if row < parameter.shape[dim]), dtype=torch.int64)
        mask = torch.ones(parameter.shape, dtype=torch.bool)
        if number:  # of the first nothing is known
            filled.learn([(parameter, dim, index)])
            mask = naive(parameter, dim, index)
        expected[at : at + parameter.numel()] = mask.flatten()
    shard_size = buffer.numel() // owners
    before = buffer.clone()
    for owner, sections in enumerate(shards):
        here = list(bundles((filled.parcel(section) for section in sections), most=most))
        sizes = [sum(parcel.numel for parcel in bundle) for bundle in here]
        assert all(0 < size <= max(most, 9) for size in sizes)
        assert all(size > most - 9 for size in sizes[:-1])  # full but for a row
        packed = [packed_of(bundle) for bundle in here]
        shard = slice(owner * shard_size, (owner + 1) * shard_size)
        sent = torch.cat(packed) if packed else torch.empty(0)
        assert sent.sort().values.tolist() == buffer[shard][expected[shard]].tolist()
        for bundle, values in zip(here, packed, strict=True):
            unpack(bundle, -values)
    assert torch.equal(buffer, torch.where(expected, -before, before))


def test_all_of_a_parameter_of_which_nothing_is_known_travels() -> None:
    buffer, parameters = in_buffer()
    (sections,) = sections_of(buffer, parameters, owners=1)
    filled = FilledEntries(sections)
    assert [filled.parcel(section).index for section in sections] == [None] * 4
    filled.learn([(parameters[0], 0, torch.tensor([1, 4]))])
    assert (parameters[0] in filled, parameters[1] in filled) == (True, False)
    filled.forget()
    assert parameters[0] not in filled


def test_what_was_learned_first_holds_for_the_step() -> None:
    """Entries are asked for once a chunk; a chunk's second answer is the first one's."""
    buffer, parameters = in_buffer()
    (sections,) = sections_of(buffer, parameters, owners=1)
    filled = FilledEntries(sections)
    filled.learn([(parameters[0], 0, torch.tensor([1, 4]))])
    filled.learn([(parameters[0], 0, torch.tensor([2])), (parameters[2], 1, torch.tensor([0]))])
    assert shapes(filled, sections) == [(3, 3), (4, 1), (7, 1), (2, 5)]


def shapes(filled: FilledEntries, sections: list[Section]) -> list[tuple[int, int]]:
    return [filled.parcel(section).shape for section in sections]


def test_a_parameter_that_is_not_in_the_buffer_is_passed_over() -> None:
    buffer, parameters = in_buffer()
    filled = FilledEntries(sections_of(buffer, parameters, owners=1)[0])
    other = Parameter(torch.zeros(2, 2))
    filled.learn([(other, 0, torch.tensor([1]))])
    assert other not in filled


def test_where_no_shard_ends_inside_a_parameter_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An all-reduce asks the device for nothing."""

    def counting(*_: Tensor) -> Iterator[Tensor]:
        raise AssertionError("counted")

    buffer, parameters = in_buffer(owners=2)
    whole, halves = (sections_of(buffer, parameters, owners=owners) for owners in (1, 2))
    monkeypatch.setattr(torch, "searchsorted", counting)
    entries = [(parameter, 0, torch.tensor([0, 2])) for parameter in parameters]
    FilledEntries(whole[0]).learn(entries)
    with pytest.raises(AssertionError, match="counted"):
        FilledEntries([*halves[0], *halves[1]]).learn(entries)


def test_a_row_that_is_longer_than_a_bundle_is_one_by_itself() -> None:
    grid = torch.arange(12.0).view(3, 4)
    parcel = Parcel(grid=grid, dim=0, index=torch.tensor([0, 2]))
    assert [[part.numel for part in bundle] for bundle in bundles([parcel], most=3)] == [[4], [4]]
