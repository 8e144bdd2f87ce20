"""What of a flat gradient buffer has to travel, and how it is laid side by side for the way.

A `Section` is a rectangle of one parameter's gradient, cut where the shards of a distributed optimizer end; it never
changes. A `Parcel` is what of it travels in one step: some of its rows or columns, or all of it. Both are views of the
buffer; the only numbers kept beside it are the rows or columns. Nothing here communicates.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_sat.engines.pieces import Piece, pieces


@dataclass(frozen=True, eq=False, kw_only=True)
class Parcel:
    """Some rows (dim 0) or columns (dim 1) of a rectangle."""

    grid: Tensor
    """[rows, columns], a view of the buffer."""
    dim: int = 0
    index: Tensor | None = None
    """Which of them, int64, distinct; None: all."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of what travels."""
        rows, columns = self.grid.shape
        if self.index is None:
            return rows, columns
        return (self.index.numel(), columns) if self.dim == 0 else (rows, self.index.numel())

    @property
    def numel(self) -> int:
        rows, columns = self.shape
        return rows * columns

    def pack(self, into: Tensor) -> None:
        """Copy what travels to ``into`` [numel]."""
        if self.index is None:
            into.view(self.shape).copy_(self.grid)
        else:
            torch.index_select(self.grid, self.dim, self.index, out=into.view(self.shape))

    def unpack(self, packed: Tensor) -> None:
        """Copy it back from ``packed`` [numel]; the rest of the rectangle stays as it is."""
        if self.index is None:
            self.grid.copy_(packed.view(self.shape))
        else:
            self.grid.index_copy_(self.dim, self.index, packed.view(self.shape))

    @property
    def line(self) -> int:
        """Elements between two places where it may be cut: a row of what travels, or one of all of it."""
        return 1 if self.index is None else self.shape[1]

    def cut(self, lines: int) -> tuple["Parcel", "Parcel"]:
        """The first ``lines``, and the rest."""
        if self.index is None:
            flat = self.grid.view(-1, 1)
            return Parcel(grid=flat[:lines]), Parcel(grid=flat[lines:])
        if self.dim == 0:
            return replace(self, index=self.index[:lines]), replace(self, index=self.index[lines:])
        return replace(self, grid=self.grid[:lines]), replace(self, grid=self.grid[lines:])


def bundles(parcels: Iterable[Parcel], *, most: int) -> Iterator[list[Parcel]]:
    """The same elements in the same order, in bundles of at most ``most`` that are full but for a row, none empty.

    A row that is longer makes a bundle by itself.
    """
    bundle: list[Parcel] = []
    room = most
    for parcel in parcels:
        rest = parcel
        while rest.numel > room:
            fitting = room // rest.line
            part, rest = rest.cut(fitting if bundle else max(1, fitting))
            yield [*bundle, part] if part.numel else bundle
            bundle, room = [], most
        if rest.numel:
            bundle.append(rest)
            room -= rest.numel
    if bundle:
        yield bundle


def pack(parcels: Sequence[Parcel], into: Tensor) -> None:
    """Copy what travels of the parcels to ``into`` [sum of numel], side by side."""
    for parcel, place in zip(parcels, _places(parcels, into), strict=True):
        parcel.pack(place)


def unpack(parcels: Sequence[Parcel], packed: Tensor) -> None:
    """The way back of `pack`."""
    for parcel, place in zip(parcels, _places(parcels, packed), strict=True):
        parcel.unpack(place)


def _places(parcels: Sequence[Parcel], packed: Tensor) -> Sequence[Tensor]:
    return packed.split([parcel.numel for parcel in parcels]) if parcels else ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Section:
    """A rectangle of one parameter's gradient that goes to one owner."""

    parameter: Parameter
    grid: Tensor
    """[rows, columns], a view of the buffer."""
    piece: Piece
    """Which rows and columns of the parameter."""

    def along(self, dim: int) -> tuple[int, int]:
        """First row (dim 0) or column (dim 1), and the one after the last."""
        return (self.piece.rows, self.piece.columns)[dim]


def sections_of(buffer: Tensor, parameters: Iterable[Parameter], *, owners: int) -> list[list[Section]]:
    """By owner, the rectangles of its shard in the order of the buffer.

    buffer: [m], contiguous; the parameters' ``main_grad`` lie in it. owners: equal shards that it is cut into. What
    lies between two parameters (padding, zero everywhere) is in no section.
    """
    shard = buffer.numel() // owners
    found: list[list[Section]] = [[] for _ in range(owners)]
    placed = [(_start(parameter, buffer=buffer), parameter) for parameter in parameters]
    for start, parameter in sorted(placed, key=lambda each: each[0]):
        end = start + parameter.numel()
        for owner in range(start // shard, (end - 1) // shard + 1):
            first, last = max(start, owner * shard), min(end, (owner + 1) * shard)
            flat = buffer[first:last]
            columns = parameter.numel() // parameter.shape[0]
            for piece in pieces(first - start, last - start, columns=columns):
                found[owner].append(Section(parameter=parameter, grid=piece.of(flat), piece=piece))
    return found


def _start(parameter: Parameter, *, buffer: Tensor) -> int:
    """Where in ``buffer`` a parameter's gradient begins, in elements."""
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return int(gradient.storage_offset()) - int(buffer.storage_offset())
