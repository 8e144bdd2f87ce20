"""Go on with a run: open one of megatron.core's distributed checkpoints, and load it into a run that fits.

`open_checkpoint` reads names and plain values and refuses what is missing, damaged or not to be trusted;
`load_checkpoint` refuses what does not fit this run before it touches anything, and then loads. What a checkpoint
holds, and how it is written, says `saving`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sat.checkpoint import folder as folders
from megatron_sat.checkpoint import rng, trust
from megatron_sat.checkpoint.header import EXTRA, Header, first_difference, plain
from megatron_sat.checkpoint.saving import Described
from megatron_sat.checkpoint.shapes import Shape, misfits, refuse_misfits, wanted_tensors
from megatron_sat.checkpoint.together import on_one_rank, refuse_together
from megatron_sat.distributed import Layout
from megatron_sat.log import warn_once

_NOT_OF_THE_MODEL = ("optimizer.", rng.PREFIX, EXTRA, "rng_state")


class Trainer(Described, Protocol):
    """What loading asks of an engine."""

    def complaint(self, saved: Mapping[str, Any]) -> str | None: ...

    def load_state_dict(self, state: Mapping[str, Any], *, with_optimizer: bool) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How much of a checkpoint to take. Field names are Megatron-LM's flags."""

    finetune: bool = False
    """Take the weights alone: a new run from iteration 0, its own schedule and data (re-warming starts here)."""
    no_load_optim: bool = False
    """Leave optimizer and learning-rate schedule as they start; the iteration goes on."""
    no_load_rng: bool = False
    """Leave the random states as they are seeded."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was opened and found whole: what it holds, nothing of it loaded."""

    folder: Path
    iteration: int
    """Completed updates; 0 of a release."""
    release: bool
    """Weights published without a run (Megatron-LM's "release"): only --finetune can start from them."""
    header: Header | None
    """None in a checkpoint of another program."""
    common: Mapping[str, Any]
    """All that is not sharded, in megatron.core's structure."""
    shapes: Mapping[str, Shape]
    """Whole shape of every tensor by key."""
    dtypes: Mapping[str, torch.dtype]


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Where a run goes on."""

    iteration: int
    consumed_train_samples: int
    extra: Mapping[str, Any]
    """The header's further values; empty after --finetune."""
    tensors: dict[str, Tensor]
    """The named tensors of all pipeline stages, whole, on the CPU; empty after --finetune."""


def open_checkpoint(root: Path, *, step: int | None = None) -> Checkpoint:
    """Find the checkpoint of iteration `step` (None: the newest) under `root` and read what it says of itself.

    Collective where there are ranks: one of them reads. Raises ValueError when there is none, when it is
    incomplete or damaged, or when loading it could run code.
    """

    def read() -> Checkpoint:
        folder, iteration = folders.find(root, step=step)
        index = trust.read_index(folder)
        trust.check_files(folder, index=index)
        trust.check_objects(folder, index=index)
        common = _read_common(folder)
        tensors = {k: t for k, t in index.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
        return Checkpoint(
            folder=folder,
            iteration=iteration or 0,
            release=iteration is None,
            header=Header.from_common(common),
            common=common,
            shapes={key: tuple(tensor.size) for key, tensor in tensors.items()},
            dtypes={key: tensor.properties.dtype for key, tensor in tensors.items()},
        )

    return on_one_rank(read)


def _read_common(folder: Path) -> Mapping[str, Any]:
    try:
        return dist_checkpointing.load_common_state_dict(str(folder))
    except (CheckpointingException, AttributeError) as error:
        # 0.16 looks for common.pt, which 0.19 no longer writes, and fails once more while it says so (0.16.1)
        raise ValueError(
            f"{folder} must be readable by megatron-core {version('megatron-core')}, its plain values are "
            f"not ({error}); load it with the version that wrote it"
        ) from error


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    trainer: Trainer,
    layout: Layout,
    tokenizer: str | None,
    data: Mapping[str, Any],
    config: LoadConfig,
) -> Resumed:
    """Load an opened checkpoint into `trainer`; collective.

    tokenizer, data: of this run, as its own header will say. Raises ValueError, on all ranks alike and before
    anything is changed, when the checkpoint does not fit this run.
    """
    with_optimizer = not (config.finetune or config.no_load_optim)
    metadata = checkpoint.common.get("content_metadata") or trainer.content_metadata
    refuse_together(_first_complaint(checkpoint, trainer=trainer, tokenizer=tokenizer, data=data, config=config))
    model = trainer.sharded_state_dict(is_loading=False, with_optimizer=False, content_metadata=metadata)
    refuse_together(_shape_complaint(checkpoint, model=model, tokenizer=tokenizer))

    state = trainer.sharded_state_dict(is_loading=True, with_optimizer=with_optimizer, content_metadata=metadata)
    states = rng.gather()
    with_rng = not (config.finetune or config.no_load_rng)
    if with_rng and not rng.fits(states, saved=checkpoint.shapes, layout=layout):
        warn_once(
            f"random states of {checkpoint.folder} are for another layout or device and stay as seeded; this "
            "matters to dropout alone"
        )
        with_rng = False
    if with_rng:
        state["sat_rng"] = rng.describe(states, layout=layout)
    if not config.finetune:
        state["sat_tensors"] = _wanted_tensors(checkpoint)
    loaded = dist_checkpointing.load(state, str(checkpoint.folder))
    trainer.load_state_dict(loaded, with_optimizer=with_optimizer)
    if with_rng:
        rng.restore(loaded["sat_rng"])
    if config.finetune:
        return Resumed(iteration=0, consumed_train_samples=0, extra={}, tensors={})
    assert checkpoint.header is not None
    return Resumed(
        iteration=checkpoint.header.iteration,
        consumed_train_samples=checkpoint.header.consumed_train_samples,
        extra=checkpoint.header.extra,
        tensors=dict(loaded["sat_tensors"]),
    )


def _wanted_tensors(checkpoint: Checkpoint) -> dict[str, ShardedTensor]:
    """All named tensors, whole on every rank: they are small, and a stage may have moved."""
    return {
        key: ShardedTensor.from_rank_offsets(
            key, torch.empty(shape, dtype=checkpoint.dtypes[key]), replica_id=dist.get_rank()
        )
        for key, shape in checkpoint.shapes.items()
        if key.startswith(EXTRA)
    }


def _first_complaint(
    checkpoint: Checkpoint,
    *,
    trainer: Trainer,
    tokenizer: str | None,
    data: Mapping[str, Any],
    config: LoadConfig,
) -> str | None:
    """Why the plain values of a checkpoint do not fit this run, or None."""
    header = checkpoint.header
    if header is not None and None not in (tokenizer, header.tokenizer) and header.tokenizer != tokenizer:
        return (
            f"the tokenizer must be the checkpoint's (fingerprint {header.tokenizer}), got {tokenizer}; pass "
            "the tokenizer that the model was trained with"
        )
    if config.finetune:
        return None
    if header is None:
        return (
            f"to go on, a checkpoint must know its run, {checkpoint.folder} has weights of another program; "
            "pass --finetune for a new run from them"
        )
    if changed := first_difference(header.data, now=plain(data), name=""):
        name, before, now = changed
        return (
            f"the data of a resumed run must be as they were, {name} was {before}, got {now}: the samples "
            "already read could not be told from the others; set it as it was, or pass --finetune for a new "
            "run from the weights"
        )
    return None if config.no_load_optim else trainer.complaint(checkpoint.common)


def _shape_complaint(checkpoint: Checkpoint, *, model: Mapping[str, Any], tokenizer: str | None) -> str | None:
    """Why the model does not fit, or None; collective: a checkpoint may have what no pipeline stage asks for."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, wanted_tensors(model))
    wanted = {key: tensor for one in everyone for key, tensor in one.items()}
    saved = {k: s for k, s in checkpoint.shapes.items() if not k.startswith(_NOT_OF_THE_MODEL)}
    known = checkpoint.header is not None and None not in (tokenizer, checkpoint.header.tokenizer)
    return refuse_misfits(misfits(wanted, saved=saved, padding_known=known), folder=str(checkpoint.folder))
