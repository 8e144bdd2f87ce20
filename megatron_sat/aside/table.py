"""Lines of many matrices moved by one kernel, which finds them in a table of addresses.

torch takes a launch for each matrix, and views to name it: for 12 layers of 4 weights with Adam's two moments, 144
launches each way. The table is made once, and serves as long as everything stays where it is.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_sat.aside.lines import Lines

PROGRAMS = 64
"""Programs that share the lines of one matrix."""
BLOCK = 1024
"""Elements of a line that a program moves at a time."""


class Table:
    """Where some lines of one dtype are. It keeps their indices alive, not their matrices."""

    def __init__(self, lines: Sequence[Lines]) -> None:
        self._indices = [(each.which, each.which.contiguous()) for each in lines]
        entries, first = [], 0
        for each, (_, index) in zip(lines, self._indices, strict=True):
            entries.append(_entry(each, index=index, first=first))
            first += each.numel
        self._entries = to_device(torch.tensor(entries, dtype=torch.int64), lines[0].tensor.device)

    def copy(self, aside: Tensor) -> None:
        """As `copy_by_torch`."""
        self._move(aside, back=False)

    def write(self, aside: Tensor) -> None:
        """As `write_by_torch`."""
        self._move(aside, back=True)

    def _move(self, aside: Tensor, *, back: bool) -> None:
        grid = len(self._indices), PROGRAMS
        _kernels().move[grid](self._entries, aside, PROGRAMS=PROGRAMS, BLOCK=BLOCK, BACK=back)


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """numbers: on the host. The same on ``device``, without waiting for what it is doing."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


def _entry(lines: Lines, *, index: Tensor, first: int) -> tuple[int, ...]:
    """As the kernel reads it. index: the lines' own, contiguous. first: element of the copy."""
    strides, by_rows, packed = lines.strides, lines.dim == 0, lines.packed
    if by_rows and lines.shape[1] == 1:  # a vector is one line, not as many as it has entries
        strides, by_rows, packed = (strides[1], strides[0]), False, (packed[1], packed[0])
    address = lines.tensor.data_ptr() + lines.offset * lines.tensor.element_size()
    return address, index.data_ptr(), first, *packed, *strides, int(by_rows)


def available() -> bool:
    """Whether Triton is there, which comes with torch's builds for a GPU."""
    return find_spec("triton") is not None


@cache
def _kernels() -> Any:
    """Only where a GPU is."""
    return import_module("megatron_sat.aside.kernels")
