"""A distributed checkpoint tensor by tensor: written from functions that make each when its turn comes, read in slices.

megatron.core's own save wants the whole model in memory at once. torch's planners are the seam for this: a plan says
what will be written, and the writer asks for each piece as it goes. What comes out is megatron.core's format
(torch_dist) as 0.16 and 0.19 both read it. One process; no process group is needed.
"""

import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sat.checkpoint.hf_layout import Shape


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a whole tensor, to be written when its turn comes."""

    key: str
    whole: Shape
    """Of the whole tensor."""
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Gives the part; called once. Its shape is the whole's, or 1 in front of the rest for a layer's part."""
    layer: int | None = None
    """Which entry of the first dimension this is; None: the whole tensor."""

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where it lies in the whole tensor."""
        return _chunk(self.whole, layer=self.layer)


def _chunk(whole: Shape, *, layer: int | None) -> ChunkStorageMetadata:
    if layer is None:
        return ChunkStorageMetadata(offsets=torch.Size([0] * len(whole)), sizes=torch.Size(whole))
    offsets = torch.Size([layer, *[0] * (len(whole) - 1)])
    return ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([1, *whole[1:]]))


def write_checkpoint(
    folder: Path,
    pieces: Sequence[Piece],
    *,
    objects: Mapping[str, Any],
    common: Mapping[str, Any],
    advance: Callable[[], object],
) -> None:
    """Write a distributed checkpoint into ``folder``, which exists.

    objects: what is no tensor, by megatron.core's unique key. common: plain values. advance: called once a piece.
    """
    planner = _Writing(pieces, objects=objects, advance=advance)
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    with _quietly():
        dcp.save(state_dict={}, storage_writer=writer, planner=planner, no_dist=True)
    torch.save(dict(common), folder / "common.pt")  # 0.16 reads no other place, 0.19 reads it as well
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends))


class _Writing(SavePlanner):
    """Hands each piece to torch's writer when it asks for it."""

    def __init__(
        self, pieces: Sequence[Piece], *, objects: Mapping[str, Any], advance: Callable[[], object]
    ) -> None:
        self._pieces = {MetadataIndex(piece.key, piece.chunk.offsets): piece for piece in pieces}
        self._objects, self._advance = objects, advance

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to learn: the pieces are known."""

    def create_local_plan(self) -> SavePlan:
        tensors = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=piece.chunk,
                    properties=TensorProperties(dtype=piece.dtype),
                    size=torch.Size(piece.whole),
                ),
            )
            for index, piece in self._pieces.items()
        ]
        others = [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects]
        return SavePlan([*tensors, *others])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            serialized = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], serialized)
            return serialized
        assert write_item.index.offset is not None
        piece = self._pieces[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        made = piece.make().detach().reshape(piece.chunk.sizes).clone(memory_format=torch.contiguous_format)
        assert made.dtype == piece.dtype, f"{piece.key} is {made.dtype}, announced as {piece.dtype}"
        self._advance()
        return made


def read_tensor(folder: Path, *, index: Metadata, key: str, layer: int | None) -> Tensor:
    """A whole tensor of a checkpoint, or one layer of a stacked one, on the CPU.

    index: the checkpoint's, as `trust.read_index` found it; no pickle is read here.
    """
    stored = index.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    chunk = _chunk(tuple(stored.size), layer=layer)
    target = torch.empty(chunk.sizes, dtype=stored.properties.dtype)
    reading = _Reading(key, stored, chunk, target)
    with _quietly():
        dcp.load(state_dict={}, storage_reader=_Reader(folder, index=index), planner=reading, no_dist=True)
    return target if layer is None else target[0]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's remark that one process works alone, and without its wrapping of what goes wrong in it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            raise first from None


class _Reader(dcp.FileSystemReader):
    """Reads with an index that was read before."""

    def __init__(self, folder: Path, *, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _Reading(LoadPlanner):
    """Reads one part of one tensor, from whatever chunks it was saved in."""

    def __init__(self, key: str, stored: TensorStorageMetadata, chunk: ChunkStorageMetadata, target: Tensor) -> None:
        self._items = create_read_items_for_chunk_list(key, stored, [chunk])
        self._target = target

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to learn."""

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self._items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"{read_item.storage_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The reader has copied into the target itself."""
