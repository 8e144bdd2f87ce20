"""Rows or columns of a matrix that lies somewhere in a tensor, and all of them moved by torch, one matrix at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Lines(NamedTuple):
    """Some rows or columns of a matrix. Cheap to make: no view until it is asked for."""

    tensor: Tensor
    """What the matrix lies in."""
    offset: int
    """Its first element, from the tensor's first."""
    shape: tuple[int, int]
    """[rows, columns] of the whole matrix."""
    strides: tuple[int, int]
    """Elements from one row, and from one column, to the next."""
    dim: int
    """0: rows; 1: columns."""
    which: Tensor
    """[k] int64, which of them, distinct, in any order; on the tensor's device."""

    @property
    def grid(self) -> Tensor:
        """The matrix: a view."""
        flat = self.tensor.detach()
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.offset)

    @property
    def packed(self) -> tuple[int, int]:
        """[rows, columns] of what is copied."""
        count = self.which.numel()
        return (count, self.shape[1]) if self.dim == 0 else (self.shape[0], count)

    @property
    def numel(self) -> int:
        """Elements of it."""
        rows, columns = self.packed
        return rows * columns


def lines_of(tensor: Tensor, *, dim: int, index: Tensor) -> Lines:
    """Rows (dim 0) or columns (dim 1) of a whole matrix, or entries (dim 0) of a vector."""
    rows, columns = tensor.shape if tensor.dim() == 2 else (tensor.numel(), 1)
    strides = (tensor.stride(0), tensor.stride(1) if tensor.dim() == 2 else 1)
    return Lines(tensor, 0, (rows, columns), strides, dim, index)


def copy_by_torch(lines: Sequence[Lines], aside: Tensor) -> None:
    """aside: [sum of numel], of their dtype; what they name is put there side by side."""
    for each, place in zip(lines, _places(lines, aside), strict=True):
        torch.index_select(each.grid, each.dim, each.which, out=place.view(each.packed))


def write_by_torch(lines: Sequence[Lines], aside: Tensor) -> None:
    """The way back; the rest of each matrix stays as it is."""
    for each, place in zip(lines, _places(lines, aside), strict=True):
        each.grid.index_copy_(each.dim, each.which, place.view(each.packed))


def _places(lines: Sequence[Lines], aside: Tensor) -> Sequence[Tensor]:
    return aside.split([each.numel for each in lines])
