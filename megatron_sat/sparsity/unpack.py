"""Sums that lie packed at the front of a buffer, moved to their rows or columns within that buffer.

The fast twin, for a GPU, is two hand-written kernels: torch's index_copy reaches half of the memory's rate, and what
inductor makes of the same for any shape not much more (H100). What they move is counted in docs/performance.md.
"""

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

LEAST = 8
"""One of so many rows is worth a launch; what is left is copied aside first."""
BLOCK = 2048
"""Elements of a row that one program of a kernel moves."""
ROWS = 8
"""Rows that one program moves, of the columns it has looked up."""


def unpack(full: Tensor, index: Tensor, *, dim: int) -> None:
    """full: [n, h] or [h, n], zero but for its front, which holds the k rows (dim 0) or columns (dim 1) ``index`` [k]
    packed, [k, h] or [h, k]. Afterwards each is in its place, and the rest is zero.
    """
    kernels = _kernels() if full.is_cuda else None
    if kernels is not None:
        (_rows_by_kernels if dim == 0 else _columns_by_kernels)(full, index, kernels=kernels)
        return
    shape = (index.numel(), full.size(1)) if dim == 0 else (full.size(0), index.numel())
    packed = full.view(-1)[: shape[0] * shape[1]].view(shape).clone()
    full.zero_().index_copy_(dim, index, packed)


def _rows_by_kernels(full: Tensor, index: Tensor, *, kernels: Any) -> None:
    """Rows that belong behind the packed ones go there at once; the others aside, until the front is free."""
    kept, width = index.numel(), full.size(1)
    front = full[:kept]
    aside = torch.empty_like(front)
    grid = kept, -(-width // BLOCK)
    kernels.rows_out[grid](front, aside, full, index, kept, width, BLOCK=BLOCK)
    front.zero_()
    kernels.rows_in[grid](aside, full, index, kept, width, BLOCK=BLOCK)


def _columns_by_kernels(full: Tensor, index: Tensor, *, kernels: Any) -> None:
    """From the last rows to the first, in parts whose new place is behind all that is still packed."""
    rows, width = full.shape
    kept = index.numel()
    place = torch.full((width,), -1, dtype=torch.int32, device=full.device)
    place.index_copy_(0, index, torch.arange(kept, dtype=torch.int32, device=full.device))

    def move(source: Tensor, first: int, last: int) -> None:
        grid = -(-width // BLOCK), -(-(last - first) // ROWS)
        kernels.columns[grid](source, full, place, first, last, kept, width, BLOCK=BLOCK, ROWS=ROWS)

    rest = rows
    for first in parts(rows, kept=kept, width=width):
        move(full, first, rest)
        rest = first
    if rest:
        move(full.view(-1)[: rest * kept].clone(), 0, rest)


def parts(rows: int, *, kept: int, width: int) -> Iterator[int]:
    """The first row of each part that can be moved without a copy beside it, from the last rows on.

    Rows from ``first`` to ``last`` lie packed before element last x kept, and go behind element first x width.
    """
    last = rows
    while last - (first := -(-last * kept // width)) >= max(1, rows // LEAST):
        yield first
        last = first


@cache
def _kernels() -> Any:
    """None where Triton is missing, which comes with torch's builds for a GPU: then torch moves them."""
    return import_module("megatron_sat.sparsity.unpack_kernels") if find_spec("triton") else None
