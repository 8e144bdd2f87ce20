"""Write a checkpoint of a run, before training goes on or while it does, in megatron.core's distributed format.

It holds the model under plain Megatron's keys (plain Megatron opens it), the optimizer parameter by parameter, the
schedule, the random states, a `Header`, and named tensors of whoever asks (whole tensors, replicated over tensor and
data parallelism, different names on different pipeline stages). All of it may be loaded into another layout.

However it is written, it gets its name when all ranks have written their part, and the tracker is written after that.
`save_checkpoint` returns then. `begin_checkpoint` returns when the values are safe from training; who calls it asks
whether they are written (`Unfinished.writing`), and lets all ranks finish together.
"""

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sat.checkpoint import folder as folders
from megatron_sat.checkpoint import rng
from megatron_sat.checkpoint.background import Writer
from megatron_sat.checkpoint.header import EXTRA, KEY, Header
from megatron_sat.checkpoint.together import Trouble, fail_together, on_one_rank
from megatron_sat.distributed import Layout

_CHECKPOINT_VERSION = 3.0  # Megatron-LM's: query, key and value of a group lie together


class Described(Protocol):
    """What saving asks of an engine."""

    @property
    def content_metadata(self) -> dict[str, Any]: ...

    def sharded_state_dict(
        self, *, is_loading: bool, with_optimizer: bool, content_metadata: Mapping[str, Any]
    ) -> dict[str, Any]: ...


class NotSaved(OSError):
    """A checkpoint could not be written. Its text is for the user."""


class Unfinished:
    """A checkpoint whose files are being written while training goes on. One at a time: finish it before the next."""

    def __init__(self, request: Any, *, root: Path, folder: Path, iteration: int, keep_last: int | None) -> None:
        self.iteration = iteration
        self._request, self._root, self._folder, self._keep_last = request, root, folder, keep_last
        self._writer = Writer(request, folder=folder)

    @property
    def writing(self) -> bool:
        """Whether this rank's files are still being written."""
        return self._writer.busy

    def finish(self) -> Path:
        """Wait for all ranks' files, give the checkpoint its name and point the tracker at it; collective.

        Returns its folder. Raises NotSaved on all ranks where one could not write; what was written of it is deleted.
        """
        try:
            _fail_and_clear(self._writer.wait(), folder=self._folder)
            self._writer.hand_over()
            for step in self._request.finalize_fns:
                step()
            _name(self._root, iteration=self.iteration, keep_last=self._keep_last)
        except OSError as error:
            raise _not_saved(error, root=self._root, iteration=self.iteration) from error
        return folders.folder_of(self._root, self.iteration)

    def discard(self) -> None:
        """Give it up, on this rank alone. What was written is never taken for a checkpoint, and goes with the next."""
        self._writer.kill()


def save_checkpoint(
    root: Path,
    *,
    trainer: Described,
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
    _check(keep_last)
    state = _held(
        trainer, header=header, tensors=tensors, layout=layout, with_optimizer=with_optimizer, with_rng=with_rng
    )
    metadata = trainer.content_metadata
    try:
        folder = on_one_rank(lambda: folders.begin(root, header.iteration))
        _write(state, folder=folder, layout=layout, metadata=metadata)
        _name(root, iteration=header.iteration, keep_last=keep_last)
    except OSError as error:
        raise _not_saved(error, root=root, iteration=header.iteration) from error
    return folders.folder_of(root, header.iteration)


def begin_checkpoint(
    root: Path,
    *,
    trainer: Described,
    header: Header,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    with_optimizer: bool = True,
    with_rng: bool = True,
    keep_last: int | None = None,
) -> Unfinished:
    """Begin to write what `save_checkpoint` would, as it is now, while the caller goes on; collective.

    Costs the planning of the checkpoint and, on a device, a copy of this rank's part to the host's memory, which is
    held until the part is written; on a CPU the pages that training changes meanwhile. Raises NotSaved as above.
    """
    _check(keep_last)
    state = _held(
        trainer, header=header, tensors=tensors, layout=layout, with_optimizer=with_optimizer, with_rng=with_rng
    )
    metadata = trainer.content_metadata
    try:
        folder = on_one_rank(lambda: folders.begin(root, header.iteration))
        request = dist_checkpointing.save(
            state, str(folder), _strategy(layout), content_metadata=metadata, **_background()
        )
    except OSError as error:
        raise _not_saved(error, root=root, iteration=header.iteration) from error
    return Unfinished(request, root=root, folder=folder, iteration=header.iteration, keep_last=keep_last)


def _background() -> dict[str, Any]:
    """How megatron.core is told to leave the writing to us."""
    asked: dict[str, Any] = {"async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        asked["async_strategy"] = "mcore"  # 0.19, whose default is a package of its own; may go with 0.16
    return asked


def _check(keep_last: int | None) -> None:
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"--save-keep-last must be at least 1, got {keep_last}; leave it out to keep all")


def _held(
    trainer: Described,
    *,
    header: Header,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    with_optimizer: bool,
    with_rng: bool,
) -> dict[str, Any]:
    """All that a checkpoint holds; its tensors are the run's own."""
    state = trainer.sharded_state_dict(
        is_loading=False, with_optimizer=with_optimizer, content_metadata=trainer.content_metadata
    )
    state.update(iteration=header.iteration, checkpoint_version=_CHECKPOINT_VERSION)
    state[KEY] = header.to_plain()
    if tensors:  # a stage without layers has none, and an empty entry would count as a common value
        state["sat_tensors"] = _describe_tensors(tensors, layout=layout)
    if with_rng:
        state["sat_rng"] = rng.describe(rng.gather(), layout=layout)
    return state


def _describe_tensors(tensors: Mapping[str, Tensor], *, layout: Layout) -> dict[str, ShardedTensor]:
    assert all(name.startswith(EXTRA) for name in tensors), f"named tensors start with {EXTRA}: {list(tensors)[:3]}"
    replica = (0, layout.tp_rank, layout.dp_rank * layout.cp_size + layout.cp_rank)
    return {name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=replica) for name, tensor in tensors.items()}


def _strategy(layout: Layout) -> Any:
    strategy = get_default_save_sharded_strategy()
    if layout.dp_size * layout.cp_size > 1:  # replicas share the writing
        strategy = FullyParallelSaveStrategyWrapper(strategy, layout.dp_cp_group)
    return strategy


def _write(state: dict[str, Any], *, folder: Path, layout: Layout, metadata: dict[str, Any]) -> None:
    """Let every rank write its part. Raises OSError with what the system said: on all ranks where one could not, on
    rank 0 alone where it could not write what it writes alone: the others wait, and end when it does."""
    trouble: Trouble | None = None
    try:
        dist_checkpointing.save(state, str(folder), _strategy(layout), content_metadata=metadata)
    except CheckpointException as error:
        trouble = folders.writing_trouble(folder) or (0, " ".join(str(error).split())[:200])
    _fail_and_clear(trouble, folder=folder)


def _fail_and_clear(trouble: Trouble | None, *, folder: Path) -> None:
    """Raise OSError on all ranks where one had trouble; what was written takes room, and goes."""
    try:
        fail_together(trouble)
    except OSError:
        on_one_rank(lambda: shutil.rmtree(folder, ignore_errors=True))
        raise


def _name(root: Path, *, iteration: int, keep_last: int | None) -> None:
    on_one_rank(lambda: folders.finish(root, iteration, keep_last=keep_last))


def _not_saved(error: OSError, *, root: Path, iteration: int) -> NotSaved:
    there = folders.iterations(root)
    stands = f"that of step {there[-1]} is whole: resume from it" if there else "none is there yet: start again"
    return NotSaved(
        f"the checkpoint of step {iteration} must be written to {root}, it cannot: {error.strerror or error}; make "
        f"room or choose another --save; {stands}"
    )
