"""Hugging Face's weights into a distributed checkpoint: a release, which a run starts from with ``--finetune``.

Names, shapes and types are checked before anything is written; then tensors pass through one at a time. The checkpoint
does not depend on tensor or pipeline parallelism: any layout opens it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sat import log
from megatron_sat.checkpoint import folder as folders
from megatron_sat.checkpoint.header import KEY, Header
from megatron_sat.checkpoint.hf_files import Tensors
from megatron_sat.checkpoint.hf_layout import LAYOUTS, Dimensions
from megatron_sat.checkpoint.hf_names import (
    EXTRA_STATES,
    NAMES,
    TIED_HEAD,
    Features,
    Row,
    layers,
    refuse_other_names,
    rows,
)
from megatron_sat.checkpoint.hf_stream import Piece, write_checkpoint

_CHECKPOINT_VERSION = 3.0  # Megatron-LM's: query, key and value of a group lie together


def import_weights(
    hf: Path,
    root: Path,
    *,
    features: Features,
    dims: Dimensions,
    header: Header,
    dtype: torch.dtype | None = None,
    table: Sequence[Row] = NAMES,
) -> None:
    """Write ``root/release`` and the tracker from the safetensors of ``hf``.

    dtype: convert to it; None keeps each tensor's own. table: of names, another one in tests only.
    Raises ValueError, before anything is written, for tensors that are missing, too many, or of a wrong shape.
    """
    tensors = Tensors(hf)
    refuse_other_names(tensors.shapes, features=features, table=table)
    _refuse_second_head(tensors, features=features, table=table)
    pieces = list(_pieces(tensors, features=features, dims=dims, dtype=dtype, table=table))
    folder = root / folders.RELEASE
    folder.mkdir(parents=True)
    common = {"iteration": 0, "checkpoint_version": _CHECKPOINT_VERSION, KEY: header.to_plain()}
    with log.progress(len(pieces), f"importing {hf.name}") as advance:
        write_checkpoint(folder, pieces, objects=_extra_states(features), common=common, advance=advance)
    (root / folders.TRACKER).write_text(folders.RELEASE)


def _pieces(
    tensors: Tensors, *, features: Features, dims: Dimensions, dtype: torch.dtype | None, table: Sequence[Row]
) -> list[Piece]:
    """What will be written, in the table's order; nothing is read yet."""
    found = []
    for row in rows(features, table=table):
        every = [name for layer in layers(row, features=features) for name in row.names(layer)]
        kinds = sorted({tensors.dtypes[name] for name in every}, key=str)
        if dtype is None and len(kinds) > 1:
            raise ValueError(
                f"the tensors of {row.megatron} must have one type, got {' and '.join(map(str, kinds))}; pass --dtype"
            )
        found += [
            _piece(tensors, row=row, layer=layer, features=features, dims=dims, dtype=dtype or kinds[0])
            for layer in layers(row, features=features)
        ]
    return found


def _piece(
    tensors: Tensors, *, row: Row, layer: int, features: Features, dims: Dimensions, dtype: torch.dtype
) -> Piece:
    names, layout = row.names(layer), LAYOUTS[row.layout]
    try:
        shape = layout.joined([tensors.shapes[name] for name in names], dims)
    except ValueError as error:
        raise ValueError(f"{', '.join(names)}: {error}; config.json is of another model") from None
    return Piece(
        key=row.megatron,
        whole=(features.num_layers, *shape) if row.per_layer else shape,
        dtype=dtype,
        make=lambda: layout.join([tensors.read(name).to(dtype) for name in names], dims),
        layer=layer if row.per_layer else None,
    )


def _refuse_second_head(tensors: Tensors, *, features: Features, table: Sequence[Row]) -> None:
    """A tied head may lie in the file too, if it is the embedding bit for bit. Raises ValueError."""
    if features.untied or TIED_HEAD not in tensors.shapes:
        return
    (embedding,) = next(row for row in table if row.layout == "vocabulary").theirs
    if not torch.equal(tensors.read(TIED_HEAD), tensors.read(embedding)):
        raise ValueError(
            f"with tie_word_embeddings {TIED_HEAD} must be {embedding}, they differ; set tie_word_embeddings to false "
            "in config.json if the model has a head of its own"
        )


def _extra_states(features: Features) -> Mapping[str, Any]:
    count = features.num_layers
    return {f"{key}/shard_{layer}_{count}": None for key in EXTRA_STATES for layer in range(count)}
