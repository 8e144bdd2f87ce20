"""A distributed checkpoint's weights into Hugging Face's safetensors: the inverse of `hf_import`, by the same table.

Names and shapes are checked before anything is written; then one shard at a time is read, split and written. The
optimizer's state and what else a training run saved is not looked at; sparsity never is in a checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_sat import log
from megatron_sat.checkpoint import rng, trust
from megatron_sat.checkpoint.header import EXTRA
from megatron_sat.checkpoint.hf_files import write_tensors
from megatron_sat.checkpoint.hf_layout import LAYOUTS, Dimensions, Shape
from megatron_sat.checkpoint.hf_names import NAMES, Features, Row, layers, rows
from megatron_sat.checkpoint.hf_stream import read_tensor
from megatron_sat.checkpoint.resume import Checkpoint

SHARD_BYTES = 5 * 10**9
"""Of one file, as transformers writes."""
_OF_A_RUN = ("optimizer.", rng.PREFIX, EXTRA, "rng_state")


def export_weights(
    checkpoint: Checkpoint,
    hf: Path,
    *,
    features: Features,
    dims: Dimensions,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    table: Sequence[Row] = NAMES,
) -> None:
    """Write the safetensors of an opened checkpoint, and their index, into ``hf``, which exists.

    dtype: convert to it; None keeps each tensor's own. Padding of the vocabulary stays behind.
    Raises ValueError, before anything is written, for tensors that are missing, too many, or of a wrong shape.
    """
    index = trust.read_index(checkpoint.folder)
    _refuse_other_tensors(checkpoint, features=features, dims=dims, table=table)
    reading = _Reading(checkpoint.folder, index=index, dims=dims, dtype=dtype)
    plan: list[tuple[str, Shape, torch.dtype]] = []
    for row in rows(features, table=table):
        shape = checkpoint.shapes[row.megatron][1 if row.per_layer else 0 :]
        parts = LAYOUTS[row.layout].parts(shape, dims)
        for layer in layers(row, features=features):
            for place, name in enumerate(row.names(layer)):
                plan.append((name, parts[place], dtype or checkpoint.dtypes[row.megatron]))
                reading.where[name] = (row, layer if row.per_layer else None, place)
    with log.progress(len(plan), f"exporting to {hf.name}") as advance:

        def read(name: str) -> Tensor:
            advance()
            return reading.part(name)

        write_tensors(hf, plan, read=read, max_shard_bytes=max_shard_bytes)


class _Reading:
    """Splits each tensor of ours once, though its parts are asked for one by one."""

    def __init__(self, folder: Path, *, index: Metadata, dims: Dimensions, dtype: torch.dtype | None) -> None:
        self.where: dict[str, tuple[Row, int | None, int]] = {}
        self._folder, self._index, self._dims, self._dtype = folder, index, dims, dtype
        self._last: tuple[str, int | None] = ("", None)
        self._parts: list[Tensor] = []

    def part(self, name: str) -> Tensor:
        """One tensor of theirs."""
        row, layer, place = self.where[name]
        if self._last != (row.megatron, layer):
            whole = read_tensor(self._folder, index=self._index, key=row.megatron, layer=layer)
            self._parts, self._last = LAYOUTS[row.layout].split(whole, self._dims), (row.megatron, layer)
        return self._parts[place].to(self._dtype or self._parts[place].dtype).clone()


def _refuse_other_tensors(
    checkpoint: Checkpoint, *, features: Features, dims: Dimensions, table: Sequence[Row]
) -> None:
    """Raise ValueError that lists what the model has and the table has not, and the other way round."""
    wanted = {row.megatron: row for row in rows(features, table=table)}
    saved = {key: shape for key, shape in checkpoint.shapes.items() if not key.startswith(_OF_A_RUN)}
    lines = [f"\n  missing: {key}" for key in wanted if key not in saved]
    lines += [f"\n  unexpected: {key}" for key in saved if key not in wanted]
    for key, row in wanted.items():
        if key in saved and row.per_layer and saved[key][0] != features.num_layers:
            lines.append(f"\n  {key}: {saved[key][0]} layers, {features.num_layers} wanted")
        if key in saved and row.layout == "vocabulary" and saved[key][0] != dims.padded_vocab_size:
            lines.append(f"\n  {key}: {saved[key][0]} rows, {dims.padded_vocab_size} wanted")
    if lines:
        raise ValueError(
            f"the tensors of {checkpoint.folder} must be those of the model that config.json describes, "
            f"{len(lines)} are not:{''.join(lines)}\ngive the configuration of this model with --like; nothing was "
            "written"
        )
