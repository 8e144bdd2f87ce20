"""A run's own checkpoints: written before training goes on, or while it does (``--async-save``), one at a time.

Whichever way, what is said of one (the line in the log, the visits beside it, that it is the newest) is said when it is
whole, and it holds the values of its own step.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron_sat import log
from megatron_sat.checkpoint.header import Header
from megatron_sat.checkpoint.saving import NotSaved, Unfinished, begin_checkpoint, save_checkpoint
from megatron_sat.distributed import Layout
from megatron_sat.engines.base import Engine
from megatron_sat.training.response import BadStep
from megatron_sat.training.settings import CheckpointConfig
from megatron_sat.training.visits import save_visits


class Checkpoints:
    """Writes them, and knows the newest that is whole."""

    def __init__(self, config: CheckpointConfig, *, engine: Engine, layout: Layout) -> None:
        self._config, self._engine, self._layout = config, engine, layout
        self.newest: tuple[Path, int] | None = None
        """Folder of the checkpoints and iteration: of this run, or the one that it went on from."""
        self._unfinished: Unfinished | None = None
        self._began = 0.0
        self._say: Callable[[str], None] = lambda how: None

    def save(
        self, header: Header, *, tensors: Mapping[str, Tensor], visits: Mapping[str, np.ndarray], keep_all: bool
    ) -> None:
        """Write one under ``--save``, or begin to; collective. What is still being written is finished before.

        tensors: as `save_checkpoint` takes them. visits: of `training.state.whole_visits`. keep_all: drop no older one.
        Raises NotSaved where this one or the one before could not be written.
        """
        self.finish()
        config = self._config
        assert config.save is not None, "a run without --save does not save"
        root, step, writes = Path(config.save), header.iteration, dist.get_rank() == 0

        def saved(how: str) -> None:
            self.newest = (root, step)
            if writes:
                save_visits(root / "visits.npz", visits, steps=step)
                log.say(f"step {step:>6} | saved to {root}{how}")

        write = begin_checkpoint if config.async_save else save_checkpoint
        self._began = time.monotonic()
        begun = write(
            root,
            trainer=self._engine,
            header=header,
            tensors=tensors,
            layout=self._layout,
            with_optimizer=config.save_optim,
            with_rng=config.save_rng,
            keep_last=None if keep_all else config.save_keep_last,
        )
        if isinstance(begun, Unfinished):
            self._unfinished, self._say = begun, saved
        else:
            saved("")

    @property
    def writing(self) -> bool:
        """Whether this rank's part of one is still being written."""
        return self._unfinished is not None and self._unfinished.writing

    def finish(self) -> None:
        """Wait for what is being written, and make a checkpoint of it; collective; nothing where nothing is.

        Raises NotSaved, on all ranks alike, where it could not be written.
        """
        if self._unfinished is None:
            return
        try:
            self._unfinished.finish()
        except NotSaved:
            self._unfinished = None
            raise
        self._unfinished = None
        self._say(f" in the background within {time.monotonic() - self._began:.1f} s")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around a run: at its end, and where a bad step ends it on all ranks alike, what is being written is finished.

        Where one rank leaves in any other way it gives its part up; the others cannot finish without it.
        """
        try:
            try:
                yield
            except BadStep as bad:
                self._finish_before(bad)
                raise
            self.finish()
        finally:
            self.discard()

    def _finish_before(self, end: BadStep) -> None:
        try:
            self.finish()
        except NotSaved as problem:
            raise BadStep(f"{end}. Besides, {problem}") from end

    def discard(self) -> None:
        """Give up what is being written, on this rank alone; nothing where nothing is."""
        if self._unfinished is not None:
            self._unfinished.discard()
            self._unfinished = None
