"""The kernels of `unpack`, in Triton: each moves one block of a row, or some rows of a block of columns.

Triton takes no annotations but its own. All arrays are contiguous. Places are counted in 64 bits: the gradients of a
weight may take more than 2**31 bytes.
"""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def rows_out(front, aside, full, index, kept, width, BLOCK: tl.constexpr):
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
def rows_in(aside, full, index, kept, width, BLOCK: tl.constexpr):
    """Rows of aside that belong to the first ``kept`` rows of full -> there."""
    number = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + number)
    mine = (columns < width) & (row < kept)
    values = tl.load(aside + number * width + columns, mask=mine)
    tl.store(full + row * width + columns, values, mask=mine)


@triton.jit
def columns(source, full, place, first, last, kept, width, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows first to last: column c of full [h, width] <- column place[c] of source [h, kept]; 0 where place is -1."""
    there = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = there < width
    number = tl.load(place + there, mask=inside, other=-1)
    for step in range(ROWS):
        row = (first + tl.program_id(1) * ROWS + step).to(tl.int64)
        values = tl.load(source + row * kept + number, mask=(number >= 0) & (row < last), other=0.0)
        tl.store(full + row * width + there, values, mask=inside & (row < last))
