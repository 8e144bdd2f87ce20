"""Which entries of an optimizer's tensors are held: worked out once a choice, not once a step.

Whoever names held entries says rows or columns of parameters; what one rank's optimizer has of these are rows or
columns of rectangles (`pieces`) of its own tensors (`stretch`). As long as the same index tensors are handed over and
the optimizer has its parameters where it had them, the answer is the one of the step before.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_sat.aside.lines import Lines
from megatron_sat.aside.table import to_device
from megatron_sat.engines.base import Held
from megatron_sat.engines.pieces import Piece, pieces
from megatron_sat.engines.stretch import Find, Stretch


@dataclass(frozen=True, eq=False)
class Part:
    """Held rows or columns of one rectangle."""

    stretch: Stretch
    piece: Piece
    dim: int
    index: Tensor
    """[k] int64, counted within the piece, on the device of the stretch."""

    @property
    def along(self) -> tuple[int, int]:
        """First row (dim 0) or column (dim 1) of the piece in the parameter, and the one after the last."""
        return (self.piece.rows, self.piece.columns)[self.dim]

    def of(self, tensor: Tensor) -> Lines:
        """The same entries of the stretch's tensor, or of one of its shape."""
        (first_row, last_row), (first, last) = self.piece.rows, self.piece.columns
        shape = last_row - first_row, last - first
        return Lines(tensor, self.stretch.offset + self.piece.start, shape, (shape[1], 1), self.dim, self.index)


@dataclass(frozen=True, eq=False)
class _Asked:
    """What was handed over for one parameter, and where the optimizer has it."""

    parameter: Parameter
    dim: int
    index: Tensor
    stretch: Stretch

    def same(self, other: "_Asked") -> bool:
        """Whether the other leads to the same parts."""
        if self.parameter is not other.parameter or self.index is not other.index or self.dim != other.dim:
            return False
        mine, theirs = self.stretch, other.stretch
        return mine.main is theirs.main and (mine.offset, mine.start, mine.length) == (
            theirs.offset,
            theirs.start,
            theirs.length,
        )

    def parts(self) -> Iterator[Part]:
        """One for each piece, each with the whole index: counted from the parameter's start."""
        stretch = self.stretch
        index = self.index.to(stretch.main.device)
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        columns = stretch.shape.numel() // stretch.shape[0]
        for piece in pieces(stretch.start, stretch.start + stretch.length, columns=columns):
            yield Part(stretch, piece, self.dim, index)

    def is_whole(self, part: Part) -> bool:
        """Whether the piece has every row, or every column, that the index may name."""
        rows = self.stretch.shape[0]
        return part.along == (0, rows if self.dim == 0 else self.stretch.shape.numel() // rows)


class HeldParts:
    """The parts of what was asked for last."""

    def __init__(self) -> None:
        self._asked: list[_Asked] = []
        self._parts: list[Part] = []

    def of(self, entries: Iterable[Held], *, find: Find, own: Set[int]) -> list[Part]:
        """The parts of these entries. own: ids of the optimizer's tensors; what is not in them is passed over."""
        asked = []
        for parameter, dim, index in entries:
            stretch = find(parameter)
            if stretch is not None and id(stretch.main) in own:
                asked.append(_Asked(parameter, dim, index, stretch))
        before, self._asked = self._asked, asked
        if len(asked) != len(before) or not all(new.same(old) for new, old in zip(asked, before, strict=True)):
            self._parts = _parts_of(asked)
        return self._parts


def _parts_of(asked: Iterable[_Asked]) -> list[Part]:
    whole: list[Part] = []
    torn: list[Part] = []
    for each in asked:
        for part in each.parts():
            (whole if each.is_whole(part) else torn).append(part)
    return [part for part in (*whole, *_cut(torn)) if part.index.numel()]


def _cut(torn: Sequence[Part]) -> list[Part]:
    """Parts with the whole index in, with what of it lies in their pieces out, counted from there.

    How many that are depends on which they are, so the host reads all indices; at once, for it waits for the device.
    """
    if not torn:
        return []
    indices = list({id(part.index): part.index for part in torn}.values())
    sizes = [index.numel() for index in indices]
    read = dict(zip(map(id, indices), torch.cat(indices).cpu().split(sizes), strict=True))
    inside = []
    for part in torn:
        first, last = part.along
        index = read[id(part.index)]
        inside.append(index[(index >= first) & (index < last)] - first)
    there = to_device(torch.cat(inside), torn[0].index.device).split([index.numel() for index in inside])
    return [replace(part, index=index) for part, index in zip(torn, there, strict=True)]
