"""Which documents a training sample was cut from: what a person looks up when a sample did harm."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import Dataset


@dataclass(frozen=True, kw_only=True)
class Whereabouts:
    """Where a sample's tokens stand."""

    prefix: str
    """Of the .bin and .idx."""
    documents: tuple[int, ...]
    """Numbers of the documents, counted from 0 in the order of the files, in the sample's order."""


@runtime_checkable
class Knows(Protocol):
    """A data set that can tell itself."""

    def whereabouts(self, sample: int) -> tuple[Whereabouts, ...]: ...


def whereabouts(dataset: Dataset, sample: int) -> tuple[Whereabouts, ...]:
    """The documents of one sample of a data set that `blend` or `sft` built, a file each; () of any other."""
    if isinstance(dataset, Knows):
        return dataset.whereabouts(sample)
    if isinstance(dataset, BlendedDataset):
        dataset[sample]  # loads the indices, where they are loaded late
        which, inner = int(dataset.dataset_index[sample]), int(dataset.dataset_sample_index[sample])
        return whereabouts(dataset.datasets[which], inner)
    if not isinstance(dataset, GPTDataset):
        return ()
    indices: Any = dataset
    _, documents, *_ = indices._query_document_sample_shuffle_indices(sample)
    where = Whereabouts(prefix=str(dataset.dataset_path), documents=tuple(int(document) for document in documents))
    return (where,)
