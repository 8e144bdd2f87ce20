"""Which examples share a window, and in which order windows come: a function of lengths and a seed alone.

Epoch after epoch the examples are shuffled and each is laid into the fullest window that still has room for it (best
fit); then the windows are shuffled. Without packing each example is a window of its own. Nothing here reads tokens.
"""

from collections.abc import Sequence

import numpy as np

Window = np.ndarray
"""[examples] i64: numbers of the examples that lie in it, in their order."""


def pack(order: Sequence[int], *, lengths: Sequence[int], size: int) -> list[Window]:
    """Windows of at most ``size`` tokens, each of ``order``'s examples in one of them.

    lengths: tokens of every example, by its number, each in [1, size]. Windows come in the order in which they were
    begun; the examples of one in that in which they came.
    """
    windows: list[list[int]] = []
    open_at: dict[int, list[int]] = {}  # by room left, the windows that have it, the youngest last
    rooms = 0  # bit r: some window has room r; so the least room that is enough is found at once
    for example in order:
        length = int(lengths[example])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = open_at[room].pop()
            if not open_at[room]:
                rooms &= ~(1 << room)
            windows[number].append(example)
        else:
            room, number = size, len(windows)
            windows.append([example])
        if left := room - length:
            open_at.setdefault(left, []).append(number)
            rooms |= 1 << left
    return [np.array(window, dtype=np.int64) for window in windows]


def windows_of_epoch(epoch: int, *, lengths: np.ndarray, size: int, seed: int, packed: bool) -> list[Window]:
    """All windows of one epoch (counted from 0), in the order in which training reads them."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if not packed:
        return list(order.astype(np.int64)[:, None])
    windows = pack(order.tolist(), lengths=lengths.tolist(), size=size)
    return [windows[place] for place in generator.permutation(len(windows))]


def windows_in_order(*, lengths: np.ndarray, size: int, packed: bool) -> list[Window]:
    """All windows once, for an evaluation: examples are taken as they come."""
    order = np.arange(len(lengths), dtype=np.int64)
    return pack(order.tolist(), lengths=lengths.tolist(), size=size) if packed else list(order[:, None])
