"""The kernel of `table`, in Triton: rows or columns of many matrices, copied to one vector or back.

Triton takes no annotations but its own. Numbers are copied as they are. Places are counted in 64 bits.
"""

# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def move(table, aside, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr):
    """Entry number program_id(0) of table, every PROGRAMS-th line of it from program_id(1) on. BACK: aside -> matrix.

    table [entries, 8] int64: address of the matrix, address of the index, first element in aside, lines and elements of
    a line as they lie there, strides of the matrix between rows and between columns, 1 if the index is of rows.
    """
    entry = table + tl.program_id(0) * 8
    matrix = tl.load(entry).to(aside.dtype)
    index = tl.load(entry + 1).to(tl.pointer_type(tl.int64))
    packed = aside + tl.load(entry + 2)
    lines = tl.load(entry + 3)
    width = tl.load(entry + 4)
    between_rows = tl.load(entry + 5)
    between_columns = tl.load(entry + 6)
    by_rows = tl.load(entry + 7) == 1
    for first in range(0, width, BLOCK):
        number = first + tl.arange(0, BLOCK)
        inside = number < width
        # one of the two is looked up, the other is its own number: columns here, rows line by line
        column = tl.where(by_rows, number, tl.load(index + number, mask=inside & (by_rows == 0), other=0))
        for line in range(tl.program_id(1).to(tl.int64), lines, PROGRAMS):
            row = tl.where(by_rows, tl.load(index + line, mask=by_rows, other=0), line)
            there = matrix + row * between_rows + column * between_columns
            here = packed + line * width + number
            if BACK:
                tl.store(there, tl.load(here, mask=inside), mask=inside)
            else:
                tl.store(here, tl.load(there, mask=inside), mask=inside)
