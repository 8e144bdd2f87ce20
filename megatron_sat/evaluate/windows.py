"""Documents to windows of at most `seq_length` tokens, windows to batches.

Each document stands on its own, behind a start token that is not scored. Its first window scores up to ``seq_length``
tokens; each further window begins ``stride`` tokens later and scores the tokens that no window before it reached. So
every token is scored once, and behind the first window with at least ``seq_length - stride`` tokens of context.

Batches hold windows of similar length, padded on the right, where a causal model does not look. Legend: `b` windows
of a batch, `s` tokens of the longest of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

UNSCORED = -1
"""The label of a token that is context, or filling."""
FILLING = 0
"""The token behind a window's end; any one would do."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of a document, with what it predicts."""

    document: np.ndarray
    """[n] ids of the whole document, the start token in front."""
    begin: int
    """First token that is read."""
    first: int
    """First token that is scored, at least ``begin + 1``."""
    end: int
    """Behind the last token that is scored."""

    @property
    def length(self) -> int:
        """Tokens that are read."""
        return self.end - 1 - self.begin

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return self.end - self.first


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Windows side by side."""

    tokens: Tensor
    """[b, s] int64."""
    labels: Tensor
    """[b, s] int64: what follows each token, or UNSCORED."""


def check_sizes(seq_length: int, *, stride: int, longest: int) -> None:
    """Raise ValueError for windows that cannot be. longest: positions that the model has."""
    if not 1 <= seq_length <= longest:
        raise ValueError(
            f"--seq-length must be between 1 and the model's {longest} positions, got {seq_length}; choose such a one"
        )
    if not 1 <= stride <= seq_length:
        raise ValueError(
            f"--stride must be between 1 and --seq-length ({seq_length}), got {stride}: a larger one would leave "
            f"tokens out; {max(1, seq_length // 2)} gives each token half a window of context"
        )


def windows_of(ids: np.ndarray, *, start: int, seq_length: int, stride: int) -> Iterator[Window]:
    """The windows of one document. ids: [n] without special tokens; none gives no window. start: read before it."""
    document = np.concatenate(([start], ids)).astype(np.int64)  # [n + 1]
    first, begin = 1, 0
    while first < len(document):
        end = min(begin + seq_length + 1, len(document))
        yield Window(document=document, begin=begin, first=first, end=end)
        first, begin = end, begin + stride


def batches_of(windows: Sequence[Window], *, size: int, together: int, part: int, parts: int) -> Iterator[list[Batch]]:
    """Windows as lists of ``together`` batches of one shape: what one pass through a pipeline takes.

    The longest come first, so that what does not fit into memory shows at once. size: windows of a batch. part, parts:
    which replica this is of how many; the lists are dealt out in turn. A list that is not full has fewer batches; its
    last batch has fewer windows where it is the only one, else empty ones.
    """
    in_order = sorted(windows, key=lambda window: window.length, reverse=True)
    for begin in range(part * size * together, len(in_order), parts * size * together):
        dealt = in_order[begin : begin + size * together]
        rows = min(size, len(dealt))
        yield [
            _side_by_side(dealt[i : i + rows], rows=rows, length=dealt[0].length) for i in range(0, len(dealt), rows)
        ]


def _side_by_side(windows: Sequence[Window], *, rows: int, length: int) -> Batch:
    tokens = torch.full((rows, length), FILLING)
    labels = torch.full((rows, length), UNSCORED)
    for row, window in enumerate(windows):
        document = torch.from_numpy(window.document)
        tokens[row, : window.length] = document[window.begin : window.end - 1]
        labels[row, window.first - 1 - window.begin : window.length] = document[window.first : window.end]
    return Batch(tokens=tokens, labels=labels)
