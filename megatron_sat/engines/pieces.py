"""Rectangles: what a flat range of a parameter is, when rows and columns are spoken of.

Distributed optimizers cut parameters wherever their shards end, which is seldom at the end of a row. Whoever asks for
some rows or columns of such a range asks each of its pieces.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A rectangle of a parameter [rows, columns] that lies contiguously in a flat range of it."""

    start: int
    """First element, counted from the start of the range."""
    rows: tuple[int, int]
    """First row and the one after the last."""
    columns: tuple[int, int]
    """First column and the one after the last."""

    def of(self, flat: Tensor) -> Tensor:
        """The piece of a flat range, as [rows, columns]: a view."""
        rows = self.rows[1] - self.rows[0]
        columns = self.columns[1] - self.columns[0]
        return flat[self.start : self.start + rows * columns].view(rows, columns)


def pieces(start: int, end: int, *, columns: int) -> list[Piece]:
    """Cut the flat range [start, end) of a row-major [., columns] parameter into at most three rectangles:
    the rest of a row, whole rows, the beginning of a row."""
    cut: list[Piece] = []
    at = start
    while at < end:
        row, column = divmod(at, columns)
        if column == 0 and end - at >= columns:
            last = end // columns
            cut.append(Piece(at - start, (row, last), (0, columns)))
            at = last * columns
        else:
            stop = min(end, (row + 1) * columns)
            cut.append(Piece(at - start, (row, row + 1), (column, column + stop - at)))
            at = stop
    return cut
