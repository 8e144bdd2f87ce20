"""Save a run and go on with it: megatron.core's distributed checkpoints, with what one of ours adds.

A checkpoint holds the model under plain Megatron's keys (plain Megatron opens it), the optimizer parameter by
parameter, the schedule, the random states, a `Header`, and named tensors of whoever asks (whole tensors,
replicated over tensor and data parallelism, different names on different pipeline stages). All of it may be
loaded into another layout.

`open_checkpoint` reads names and plain values and refuses what is missing, damaged or not to be trusted;
`load_checkpoint` refuses what does not fit this run before it touches anything, and then loads.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sat.checkpoint import folder as folders
from megatron_sat.checkpoint import rng, trust
from megatron_sat.checkpoint.header import KEY, Header, first_difference, plain
from megatron_sat.checkpoint.shapes import Shape, misfits, refuse_misfits, wanted_tensors
from megatron_sat.distributed import Layout
from megatron_sat.log import warn_once

EXTRA = "sat."
"""Prefix of the named tensors."""
_CHECKPOINT_VERSION = 3.0  # Megatron-LM's: query, key and value of a group lie together
_NOT_OF_THE_MODEL = ("optimizer.", rng.PREFIX, EXTRA, "rng_state")
_T = TypeVar("_T")


class Trainer(Protocol):
    """What a checkpoint asks of an engine."""

    @property
    def content_metadata(self) -> dict[str, Any]: ...

    def sharded_state_dict(
        self, *, is_loading: bool, with_optimizer: bool, content_metadata: Mapping[str, Any]
    ) -> dict[str, Any]: ...

    def complaint(self, saved: Mapping[str, Any]) -> str | None: ...

    def load_state_dict(self, state: Mapping[str, Any], *, with_optimizer: bool) -> None: ...


class NotSaved(OSError):
    """A checkpoint could not be written. Its text is for the user."""


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


def save_checkpoint(
    root: Path,
    *,
    trainer: Trainer,
    header: Header,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    with_optimizer: bool = True,
    with_rng: bool = True,
    keep_last: int | None = None,
) -> Path:
    """Write the checkpoint of `header.iteration` and point the tracker at it; collective. Returns its folder.

    tensors: whole tensors named "sat. ...", equal on all ranks of a pipeline stage; no name on two stages.
    keep_last: how many checkpoints to leave, at least 1 (None: all). Raises NotSaved where the folder cannot be written
    or is full; the checkpoints before it stay as they are.
    """
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"--save-keep-last must be at least 1, got {keep_last}; leave it out to keep all")
    metadata = trainer.content_metadata
    state = trainer.sharded_state_dict(is_loading=False, with_optimizer=with_optimizer, content_metadata=metadata)
    state.update(iteration=header.iteration, checkpoint_version=_CHECKPOINT_VERSION)
    state[KEY] = header.to_plain()
    if tensors:  # a stage without layers has none, and an empty entry would count as a common value
        state["sat_tensors"] = _describe_tensors(tensors, layout=layout)
    if with_rng:
        state["sat_rng"] = rng.describe(rng.gather(), layout=layout)
    strategy = get_default_save_sharded_strategy()
    if layout.dp_size * layout.cp_size > 1:  # replicas share the writing
        strategy = FullyParallelSaveStrategyWrapper(strategy, layout.dp_cp_group)
    try:
        folder = _on_one_rank(lambda: folders.begin(root, header.iteration))
        _write(state, root=root, folder=folder, strategy=strategy, metadata=metadata)
        _on_one_rank(lambda: folders.finish(root, header.iteration, keep_last=keep_last))
    except OSError as error:
        raise NotSaved(_not_saved(error, root=root, iteration=header.iteration)) from error
    return folders.folder_of(root, header.iteration)


def _not_saved(error: OSError, *, root: Path, iteration: int) -> str:
    there = folders.iterations(root)
    stands = f"that of step {there[-1]} is whole: resume from it" if there else "none is there yet: start again"
    return (
        f"the checkpoint of step {iteration} must be written to {root}, it cannot: {error.strerror or error}; make "
        f"room or choose another --save; {stands}"
    )


def _write(state: dict[str, Any], *, root: Path, folder: Path, strategy: Any, metadata: dict[str, Any]) -> None:
    """Let every rank write its part. Raises OSError with what the system said: on all ranks where one could not, on
    rank 0 alone where it could not write what it writes alone: the others wait, and end when it does."""
    problem: tuple[int, str] | None = None
    try:
        dist_checkpointing.save(state, str(folder), strategy, content_metadata=metadata)
    except CheckpointException as error:
        problem = folders.writing_trouble(folder) or (0, " ".join(str(error).split())[:200])
    problems: list[tuple[int, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    failed = [(found[0], f"rank {rank}: {found[1]}") for rank, found in enumerate(problems) if found is not None]
    if failed:
        _on_one_rank(lambda: shutil.rmtree(folder, ignore_errors=True))  # what was written of it takes room
        raise OSError(*max(failed, key=lambda one: bool(one[0])))


def _describe_tensors(tensors: Mapping[str, Tensor], *, layout: Layout) -> dict[str, ShardedTensor]:
    assert all(name.startswith(EXTRA) for name in tensors), f"named tensors start with {EXTRA}: {list(tensors)[:3]}"
    replica = (0, layout.tp_rank, layout.dp_rank * layout.cp_size + layout.cp_rank)
    return {name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=replica) for name, tensor in tensors.items()}


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

    return _on_one_rank(read)


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
    _refuse_together(_first_complaint(checkpoint, trainer=trainer, tokenizer=tokenizer, data=data, config=config))
    model = trainer.sharded_state_dict(is_loading=False, with_optimizer=False, content_metadata=metadata)
    _refuse_together(_shape_complaint(checkpoint, model=model, tokenizer=tokenizer))

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


def _refuse_together(problem: str | None) -> None:
    """Raise on every rank what any rank has to say: the first of them."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise ValueError(found)


def _on_one_rank(work: Callable[[], _T]) -> _T:
    """Let rank 0 do it; all ranks get its answer, or raise its ValueError or OSError."""
    if not dist.is_initialized():
        return work()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
