"""Copies of lines while somebody else writes to their matrices, one vector for each device and dtype.

The copies live from `copy` to `write_back`. What a GPU's kernel needs to know beforehand is worked out again only when
a matrix has moved, or other lines are asked for; on another device torch's operations are as good as any.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sat.aside.lines import Lines, copy_by_torch, write_by_torch
from megatron_sat.aside.table import Table, available

KERNELS_ON = "cuda"
"""Type of device whose matrices are moved by a kernel, all at once."""
Kind = tuple[torch.device, torch.dtype]
Where = tuple[int, ...]
"""What tells an entry of a table from another: addresses and shape."""


@dataclass(frozen=True, eq=False)
class _Remembered:
    where: list[Where]
    table: Table


class Copies:
    """Copies some lines and writes them back; the two may name other tensors, of the same shapes in the same order."""

    def __init__(self) -> None:
        self._copies: dict[Kind, Tensor] = {}
        self._tables: dict[Kind, _Remembered] = {}

    @torch.no_grad()
    def copy(self, lines: Iterable[Lines]) -> None:
        """Keep what they hold now. Whatever was kept before is forgotten."""
        batches = _by_kind(lines)
        self._copies.clear()
        self._tables = {kind: table for kind, table in self._tables.items() if kind in batches}
        for kind, batch in batches.items():
            device, dtype = kind
            aside = torch.empty(sum(each.numel for each in batch), dtype=dtype, device=device)
            if _by_kernel(device):
                self._table(kind, batch).copy(aside)
            else:
                copy_by_torch(batch, aside)
            self._copies[kind] = aside

    @torch.no_grad()
    def write_back(self, lines: Iterable[Lines]) -> None:
        """Put what `copy` kept to where they are, and let it go."""
        for kind, batch in _by_kind(lines).items():
            aside = self._copies.pop(kind)
            if _by_kernel(kind[0]):
                self._table(kind, batch).write(aside)
            else:
                write_by_torch(batch, aside)

    def _table(self, kind: Kind, lines: Sequence[Lines]) -> Table:
        where = [_where(each) for each in lines]
        known = self._tables.get(kind)
        if known is None or known.where != where:
            known = self._tables[kind] = _Remembered(where, Table(lines))
        return known.table


def _by_kernel(device: torch.device) -> bool:
    return device.type == KERNELS_ON and available()


def _by_kind(lines: Iterable[Lines]) -> dict[Kind, list[Lines]]:
    found: dict[Kind, list[Lines]] = {}
    for each in lines:
        if each.numel:
            found.setdefault((each.tensor.device, each.tensor.dtype), []).append(each)
    return found


def _where(lines: Lines) -> Where:
    # what a table keeps alive has its address to itself
    tensor, which = lines.tensor, lines.which
    named = which.data_ptr(), which.numel(), *which.stride()
    return tensor.data_ptr(), lines.offset, *lines.shape, *lines.strides, lines.dim, *named
