"""Windows of whole examples, each position told which example it belongs to.

A window holds ``seq_length`` positions: some examples one after another, the rest padding. Of an example all ids but
the last are read and all but the first predicted; loss is taken where the predicted id belongs to a response. Position
ids begin anew with every example, and ``segments`` numbers them, so that no layer looks from one into another. Which
windows there are is `sft_packing`'s, how an example lies on disk `sft_encode`'s.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_sat.data.batch import Batch
from megatron_sat.data.domains import Domain
from megatron_sat.data.index_file import Index, bin_path
from megatron_sat.data.sft_encode import DTYPE, read
from megatron_sat.data.sft_packing import Window
from megatron_sat.data.whereabouts import Whereabouts


class Examples:
    """The examples of one domain that can be trained on, some of its documents.

    Without the ids: ``lengths`` is [examples] i64, positions that each takes in a window.
    """

    def __init__(
        self, domain: Domain, index: Index, *, span: tuple[float, float], seq_length: int, too_long: str
    ) -> None:
        self.name, self.prefix = domain.name, domain.prefix
        first, last = (round(end * len(index.lengths)) for end in span)
        self.first, self.last = first, last
        ends = np.cumsum(index.lengths, dtype=np.int64)
        self._ids = np.memmap(bin_path(domain.prefix), dtype=DTYPE, mode="r", shape=(index.tokens,))
        documents = np.arange(first, last, dtype=np.int64)
        whole = index.lengths[first:last].astype(np.int64)
        starts = ends[first:last] - whole
        longer = whole > seq_length + 1
        kept = ~longer
        if too_long == "truncate":  # but where no word of a response is left
            for place in np.flatnonzero(longer):
                learnt = self._ids[starts[place] + 1 : starts[place] + seq_length + 1] >= 0
                kept[place] = bool(learnt.any())
        self.truncated, self.too_long = int((longer & kept).sum()), int((~kept).sum())
        self.documents, self._starts = documents[kept], starts[kept]
        self._taken = np.minimum(whole, seq_length + 1)[kept]
        self.lengths = self._taken - 1

    def __len__(self) -> int:
        return len(self.documents)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids [length + 1] i64 of an example, and which of them are learnt (bool)."""
        start = self._starts[number]
        return read(self._ids[start : start + self._taken[number]])

    @property
    def tokens(self) -> int:
        return int(self._taken.sum())


class Windows(Dataset[Batch]):
    """Samples of [s] tensors: `batch.FIELDS`, and ``segments`` (i32): 1, 2, ... by example, 0 for padding."""

    def __init__(
        self, domains: Sequence[Examples], windows: Sequence[Window], *, seq_length: int, filling: int
    ) -> None:
        """windows: of examples that are numbered through over all domains. filling: a token for what is padded."""
        self._domains, self._seq_length, self._filling = domains, seq_length, filling
        self._firsts = np.cumsum([0, *(len(each) for each in domains)])
        self._members = np.concatenate(windows)
        self._ends = np.cumsum([len(window) for window in windows])
        lengths = np.concatenate([each.lengths for each in domains])[self._members]
        self.filled = np.add.reduceat(lengths, self._ends - [len(window) for window in windows])
        """[samples] i64: positions of each that are no padding; they come first."""

    def __len__(self) -> int:
        return len(self._ends)

    def _places(self, sample: int) -> list[tuple[Examples, int]]:
        """The domain of each example of a window, and its number there."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        begin = self._ends[sample - 1] if sample else 0
        members = self._members[begin : self._ends[sample]]
        which = np.searchsorted(self._firsts, members, side="right") - 1
        return [(self._domains[d], int(m - self._firsts[d])) for d, m in zip(which, members, strict=True)]

    def __getitem__(self, sample: int) -> Batch:
        size = self._seq_length
        tokens, labels = np.full(size, self._filling, dtype=np.int64), np.full(size, self._filling, dtype=np.int64)
        positions, segments = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int32)
        mask = np.zeros(size, dtype=np.float32)
        at = 0
        for number, (examples, which) in enumerate(self._places(sample), start=1):
            ids, learnt = examples.read(which)
            here = slice(at, at + len(ids) - 1)
            tokens[here], labels[here], mask[here] = ids[:-1], ids[1:], learnt[1:]
            positions[here], segments[here] = np.arange(len(ids) - 1), number
            at = here.stop
        positions[at:] = np.arange(size - at)
        arrays = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
        return {name: torch.from_numpy(array) for name, array in {**arrays, "segments": segments}.items()}

    def whereabouts(self, sample: int) -> tuple[Whereabouts, ...]:
        """The documents that a window holds, by file."""
        found: dict[str, list[int]] = {}
        for examples, number in self._places(sample):
            found.setdefault(examples.prefix, []).append(int(examples.documents[number]))
        return tuple(Whereabouts(prefix=prefix, documents=tuple(found[prefix])) for prefix in found)
