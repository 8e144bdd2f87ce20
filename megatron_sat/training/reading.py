"""What a run reads: this rank's micro-batches of training from any sample on, and those of each evaluation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from megatron_sat.data.batch import Batch, EvaluationBatches, build_train_iterator, cut_for_context_parallel
from megatron_sat.distributed import Layout


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Micro-batches of one rank, cut for context parallelism; [b, s/cp] each."""

    layout: Layout
    device: torch.device
    micro_batch_size: int

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
        )
        return self.cut(read)

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
            )
            for name, dataset in datasets.items()
        }

    def cut(self, batches: Iterator[Batch] | EvaluationBatches) -> Iterator[Batch]:
        """This context-parallel rank's part of each."""
        layout = self.layout
        return (cut_for_context_parallel(b, cp_rank=layout.cp_rank, cp_size=layout.cp_size) for b in batches)
