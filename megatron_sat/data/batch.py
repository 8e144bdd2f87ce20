"""From data sets to the micro-batches of one rank.

A micro-batch is a dict of [b, s] tensors: ``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask``
(fp32); where windows hold several examples also their bounds (`bounds_of`). Which samples a rank sees is a function
of the samples consumed so far, the micro-batch size and the rank alone: training goes on after a resume at the next
sample, also when the number of data-parallel ranks has changed.
"""

from collections.abc import Iterator, Sized
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = dict[str, Tensor]
SEGMENTS = "segments"
"""What a sample may hold besides: [s] i32, 1, 2, ... by the example that a position belongs to, 0 for padding."""
BOUNDS = "attention_mask"
"""What a micro-batch then holds besides: `bounds_of` its segments. Model and layers know it under that name."""
FIELDS = ("tokens", "labels", "loss_mask", "position_ids")
"""What a micro-batch holds; anything else that a data set tells is left behind."""
FILLER = -1
"""A sample that counts for nothing, where ranks must have the same number of micro-batches."""


class MicroBatchSampler(Sampler[list[int]]):
    """Indices of this rank's micro-batches, from sample ``consumed_samples`` on.

    The sequence 0, 1, 2, ... is dealt out micro-batch by micro-batch to the ranks in turn, so any global
    batch holds the same samples whatever dp_size is. Ends where there is no micro-batch left for every rank.
    """

    def __init__(
        self, num_samples: int, *, micro_batch_size: int, dp_rank: int, dp_size: int, consumed_samples: int
    ) -> None:
        self._stop = num_samples
        self._size = micro_batch_size
        self._stride = micro_batch_size * dp_size
        self._start = consumed_samples
        self._offset = micro_batch_size * dp_rank

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self._start, self._stop - self._stride + 1, self._stride):
            yield list(range(first + self._offset, first + self._offset + self._size))

    def __len__(self) -> int:
        return max(0, (self._stop - self._start) // self._stride)


@runtime_checkable
class Padded(Protocol):
    """A data set that knows how much of each sample is no padding."""

    filled: np.ndarray
    """[samples] i64: positions."""


def padded_to(longest: np.ndarray, *, grain: int, size: int) -> np.ndarray:
    """Positions that micro-batches keep whose longest samples fill so many: a multiple of ``grain``, or ``size``."""
    return np.minimum(-(-longest // grain) * grain, size)


def build_train_iterator(
    dataset: Dataset,
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int,
    num_workers: int,
    device: torch.device,
    grain: int | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches of training, in order, on ``device``; [b, s] each.

    consumed_samples: samples that all ranks together have trained on. num_workers: processes that read ahead. grain:
    cut the padding off that all samples of a micro-batch have, to a multiple of this; None: leave it.
    Raises ValueError when the data set has no micro-batch left for every rank.
    """
    total = len(cast(Sized, dataset))
    sampler = MicroBatchSampler(
        total,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        consumed_samples=consumed_samples,
    )
    if len(sampler) == 0:
        raise ValueError(
            f"consumed_samples ({consumed_samples}) must leave {micro_batch_size * dp_size} of the {total} "
            "training samples, one micro-batch a rank; train for more iterations"
        )
    return _load(dataset, sampler=sampler, num_workers=num_workers, device=device, grain=grain)


class EvaluationBatches:
    """This rank's micro-batches of an evaluation: every sample once, the same number of micro-batches on each
    rank.

    The last ones are filled up with samples whose loss_mask is zero, so a sum over mask-weighted losses of
    all ranks is exact. ``len()`` is the number of micro-batches; iterate as often as needed, always from the
    first sample.
    max_samples: look only at so many; None at all. multiple: micro-batches come in multiples of this: an
    interleaved pipeline passes several on at a time.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        max_samples: int | None,
        num_workers: int,
        device: torch.device,
        multiple: int = 1,
        grain: int | None = None,
    ) -> None:
        total = len(cast(Sized, dataset))
        self.num_samples = total if max_samples is None else min(total, max_samples)
        if self.num_samples < 1:
            raise ValueError(
                f"an evaluation must have at least one sample, got {self.num_samples}; raise --eval-iters"
            )
        stride = micro_batch_size * dp_size * multiple
        filled = -(-self.num_samples // stride) * stride
        self._dataset = _Filled(dataset, num_samples=self.num_samples)
        self._sampler = MicroBatchSampler(
            filled, micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size, consumed_samples=0
        )
        self._num_workers, self._device, self._grain = num_workers, device, grain

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Batch]:
        return _load(
            self._dataset,
            sampler=self._sampler,
            num_workers=self._num_workers,
            device=self._device,
            grain=self._grain,
        )


def bounds_of(segments: Tensor) -> Tensor:
    """Where the sequences of a micro-batch lie, its windows laid end to end: i32 [2, n + 1].

    segments: [b, s], numbers of examples, 0 for padding; a stretch of one number in one window is a sequence. Row 0:
    where each of the n sequences begins, and at last b s. Row 1: 1 where it is an example, 0 where it is padding (and
    at last). Flash kernels take row 0 as it is, whatever n is, so that nothing waits for the device to count.
    """
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    flat = segments.reshape(-1)
    starts = begins.reshape(-1).nonzero().squeeze(1)
    end, nothing = torch.tensor([flat.numel()]), torch.zeros(1, dtype=torch.int32)
    real = (flat[starts] > 0).int()
    return torch.stack([torch.cat([starts, end]).int(), torch.cat([real, nothing])])


class _Filled(Dataset[Batch]):
    """The first samples of a data set, and behind them fillers without end."""

    def __init__(self, dataset: Dataset, *, num_samples: int) -> None:
        self._dataset, self._num_samples = dataset, num_samples

    def __getitem__(self, index: int) -> Batch:
        if index < self._num_samples:
            return self._dataset[index]
        sample = self._dataset[0]
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}


def cut_for_context_parallel(batch: Batch, *, cp_rank: int, cp_size: int) -> Batch:
    """This context-parallel rank's part of a micro-batch: chunks r and 2·cp − 1 − r of 2·cp, so that causal
    attention costs every rank the same.

    batch: [b, s] tensors. Returns [b, s/cp] tensors; bounds stay those of the whole. Raises ValueError when 2·cp does
    not divide s.
    """
    if cp_size == 1:
        return batch
    cut = {}
    for name, whole in batch.items():
        if name == BOUNDS:
            cut[name] = whole
            continue
        length = whole.shape[1]
        if length % (2 * cp_size):
            raise ValueError(
                f"seq_length ({length}) must be a multiple of 2 x context-parallel size = {2 * cp_size}; "
                f"try --seq-length {length // (2 * cp_size) * 2 * cp_size or 2 * cp_size}"
            )
        chunks = whole.chunk(2 * cp_size, dim=1)
        cut[name] = torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]), dim=1)
    return cut


def _load(
    dataset: Dataset, *, sampler: MicroBatchSampler, num_workers: int, device: torch.device, grain: int | None
) -> Iterator[Batch]:
    on_gpu = device.type == "cuda"
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=partial(_collate, grain=grain),
        pin_memory=on_gpu,
        multiprocessing_context="fork" if num_workers else None,  # data sets hold memory maps and tokenizers
        generator=torch.Generator(),  # the default one is the model's dropout's, and would be drawn from
    )
    for batch in loader:
        yield {name: tensor.to(device, non_blocking=on_gpu) for name, tensor in batch.items()}


def _collate(samples: list[Batch], *, grain: int | None) -> Batch:
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in FIELDS}
    if SEGMENTS not in samples[0]:
        return batch
    segments = torch.stack([sample[SEGMENTS] for sample in samples])
    if grain is not None:
        longest = (segments > 0).sum(1).max().numpy()
        kept = int(padded_to(longest, grain=grain, size=segments.size(1)))
        batch, segments = {name: whole[:, :kept] for name, whole in batch.items()}, segments[:, :kept]
    return {**batch, BOUNDS: bounds_of(segments)}
