"""The kernels of `unpack`, in Triton: each moves one block of a row, or some rows of a block of columns.

All arrays are contiguous. Places are counted in 64 bits: a weight of 70B has more than 2**31 bytes of gradient.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def rows_out(front: Any, aside: Any, full: Any, index: Any, kept: Any, width: Any, BLOCK: tl.constexpr) -> None:
    """front [kept, width]: rows that belong behind it -> their place in full; the others -> the same row of aside."""
    number = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.load(index + number)
    values = tl.load(front + number * width + columns, mask=inside)
    behind = row >= kept
    tl.store(full + row * width + columns, values, mask=inside & behind)
    tl.store(aside + number * width + columns, values, mask=inside & (row < kept))


@triton.jit
def rows_in(aside: Any, full: Any, index: Any, kept: Any, width: Any, BLOCK: tl.constexpr) -> None:
    """Rows of aside that belong to the first ``kept`` rows of full -> there."""
    number = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + number)
    mine = (columns < width) & (row < kept)
    values = tl.load(aside + number * width + columns, mask=mine)
    tl.store(full + row * width + columns, values, mask=mine)


@triton.jit
def columns(
    source: Any,
    full: Any,
    place: Any,
    first: Any,
    last: Any,
    kept: Any,
    width: Any,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Rows first to last: column c of full [h, width] <- column place[c] of source [h, kept]; 0 where place is -1."""
    there = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = there < width
    number = tl.load(place + there, mask=inside, other=-1)
    for step in range(ROWS):
        row = (first + tl.program_id(1) * ROWS + step).to(tl.int64)
        values = tl.load(source + row * kept + number, mask=(number >= 0) & (row < last), other=0.0)
        tl.store(full + row * width + there, values, mask=inside & (row < last))
