"""What a run reads: this rank's micro-batches of training from any sample on, and those of each evaluation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron_sat.data.batch import (
    Batch,
    EvaluationBatches,
    Padded,
    build_train_iterator,
    cut_for_context_parallel,
    padded_to,
)
from megatron_sat.data.blend import Datasets
from megatron_sat.distributed import Layout
from megatron_sat.training.settings import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Micro-batches of one rank, cut for context parallelism; [b, s/cp] each."""

    layout: Layout
    device: torch.device
    micro_batch_size: int
    grain: int | None = None
    """Padding that all samples of a micro-batch have is cut off, to a multiple of this; None: it is left."""

    def train(self, dataset: Dataset, *, consumed_samples: int, num_workers: int) -> Iterator[Batch]:
        """Training's micro-batches, in order, from a sample of the global order on."""
        read = build_train_iterator(
            dataset,
            micro_batch_size=self.micro_batch_size,
            dp_rank=self.layout.dp_rank,
            dp_size=self.layout.dp_size,
            consumed_samples=consumed_samples,
            num_workers=num_workers,
            device=self.device,
            grain=self.grain,
        )
        return self.cut(read)

    def positions(self, dataset: Dataset, *, samples: range, seq_length: int) -> int:
        """Positions that all replicas together compute for these samples of the global order, whole micro-batches."""
        if self.grain is None or not isinstance(dataset, Padded):
            return len(samples) * seq_length
        longest = dataset.filled[samples.start : samples.stop].reshape(-1, self.micro_batch_size).max(1)
        kept = padded_to(longest, grain=self.grain, size=seq_length)
        return int(kept.sum()) * self.micro_batch_size

    def evaluations(
        self, datasets: Mapping[str, Dataset], *, max_samples: int, multiple: int
    ) -> dict[str, EvaluationBatches]:
        """By domain, what an evaluation reads: ``max_samples``, or all where there are fewer; none at 0.

        multiple: micro-batches come in multiples of it. The micro-batches are still to be `cut`.
        """
        if not max_samples:
            return {}
        return {
            name: EvaluationBatches(
                dataset,
                micro_batch_size=self.micro_batch_size,
                dp_rank=self.layout.dp_rank,
                dp_size=self.layout.dp_size,
                max_samples=max_samples,
                num_workers=0,
                device=self.device,
                multiple=multiple,
                grain=self.grain,
            )
            for name, dataset in datasets.items()
        }

    def cut(self, batches: Iterator[Batch] | EvaluationBatches) -> Iterator[Batch]:
        """This context-parallel rank's part of each."""
        layout = self.layout
        return (cut_for_context_parallel(b, cp_rank=layout.cp_rank, cp_size=layout.cp_size) for b in batches)


def order_of(datasets: Datasets, *, training: TrainingConfig, seq_length: int, seed: int) -> dict[str, Any]:
    """What decides which sample comes when; an exact resume needs it unchanged. The digest covers the rest."""
    return {
        "--global-batch-size": training.global_batch_size,
        "--train-iters x --global-batch-size": training.train_iters * training.global_batch_size,
        "--seq-length": seq_length,
        "--seed": seed,
        "shares": {holding.name: holding.share for holding in datasets.survey.train},
        "order": datasets.order,
    }
