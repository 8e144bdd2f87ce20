"""A process that writes one rank's files of a checkpoint while the rank trains on.

It is forked: on a CPU the fork itself takes the picture, since what either process changes afterwards is its own.
Tensors elsewhere are copied before: those of a device, and those in memory that a fork shares. The process computes
nothing, touches no device and no group, and tells the rank through a pipe what became of it. It ignores the signals
that ask a run to end, since the run waits for it, and ends by itself when its rank is gone: two writers never meet in
a folder.

megatron.core brings such processes too (`async_utils`, 0.16 and 0.19). This one differs in that it starts none of its
own (one that is left behind would write on), holds no memory of the device meanwhile and no pinned memory (which 0.16
frees while it is read), needs no manager process for its answer, and hands on what the system said.
"""

import gc
import os
import queue
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor

from megatron_sat.checkpoint.folder import writing_trouble
from megatron_sat.checkpoint.together import Trouble

LOOK_SECONDS = 0.1
"""How often a writer looks whether its rank is still there."""
_ASKED_OF_THE_RUN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_FORK = get_context("fork")

Bucket = tuple[str, str, tuple[list[Any], list[tuple[Any, Tensor]]]]
"""One file: its path, its name in the checkpoint, and (values, tensors) that go into it."""


class Writer:
    """Writes the files of a request of megatron.core's `save(async_sharded_save=True)`, from now on."""

    def __init__(self, request: Any, *, folder: Path) -> None:
        """folder: of the checkpoint. Returns when the values are safe from whatever happens to the tensors."""
        self._told: dict[int, Any] | Trouble | None = {}
        self._results: queue.Queue[Any] | None = None
        if request.async_fn is None:  # every tensor of this rank is another one's to write
            return
        _, buckets, self._results = request.async_fn_args
        self._told = None
        self._answer, tell = _FORK.Pipe(duplex=False)
        how = {"transforms": request.async_fn.args[0], "folder": folder, "rank": os.getpid()}
        copies = [copied(bucket) for bucket in buckets]
        self._process = _FORK.Process(target=_work, args=(copies, tell), kwargs=how, daemon=True)
        try:
            self._process.start()
        except OSError as error:  # no memory or no number for another process; the other ranks hear of it in `finish`
            self._told = (error.errno or 0, f"no process can be forked to write it: {error.strerror}")
        tell.close()
        for _, _, (values, tensors) in buckets:  # the request stays until the end; what it holds is the process' now
            values.clear()
            tensors.clear()

    @property
    def busy(self) -> bool:
        """Whether it is still writing."""
        return self._told is None and not self._answer.poll()

    def wait(self) -> Trouble | None:
        """Wait for its end. Returns what went wrong, if anything did."""
        if self._told is None:
            try:
                self._told = self._answer.recv()
            except EOFError:
                self._process.join()
                code = self._process.exitcode or 0
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                self._told = (0, f"the process that wrote it {how}")
            self._end()
        return self._told if isinstance(self._told, tuple) else None

    def hand_over(self) -> None:
        """Lay what was written where megatron.core's finalization looks for it; after a `wait` without trouble."""
        assert isinstance(self._told, dict)
        if self._results is not None:
            self._results.put(self._told)

    def kill(self) -> None:
        """End it at once, wherever it is; nothing where it has ended."""
        if self._told is None:
            self._process.kill()
            self._told = (0, "it was given up")
            self._end()

    def _end(self) -> None:
        self._process.join()
        self._answer.close()


def copied(bucket: Bucket) -> Bucket:
    """The bucket with tensors that a forked process keeps as they are, whatever becomes of these."""
    path, name, (values, tensors) = bucket
    return path, name, (values, [(item, _kept(tensor)) for item, tensor in tensors])


def _kept(tensor: Tensor) -> Tensor:
    if not tensor.is_cpu:
        return tensor.to("cpu")  # not to pinned memory, which belongs to a driver that knows nothing of forks
    return tensor.clone() if tensor.is_shared() or tensor.is_pinned() else tensor


def _work(
    buckets: Sequence[Bucket], tell: Connection, *, transforms: Sequence[Any], folder: Path, rank: int
) -> None:
    """What the process does. rank: the process that forked it."""
    gc.disable()  # or it might free what belongs to a device
    for asks in _ASKED_OF_THE_RUN:
        signal.signal(asks, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(rank,), daemon=True).start()
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        result = write_file(bucket, transforms=transforms)
        if isinstance(result, Exception):
            tell.send(_trouble(result, folder=folder))
            return
        written[number] = result
    tell.send(written)


def write_file(bucket: Bucket, *, transforms: Sequence[Any]) -> list[Any] | Exception:
    """Write one file, to the disk. Returns where in it everything is, or what went wrong."""
    counted: queue.Queue[int] = queue.Queue()
    answer: queue.Queue[tuple[int, Any]] = queue.Queue()
    counted.put(0)
    FileSystemWriterAsync.write_preloaded_data(
        transforms, local_proc_idx=0, write_bucket=bucket, results_queue=answer, count_queue=counted, use_fsync=True
    )
    return answer.get_nowait()[1]


def _trouble(error: Exception, *, folder: Path) -> Trouble:
    """What the system said; torch hides it behind errors of its own."""
    if isinstance(error, OSError) and error.errno:
        return error.errno, error.strerror or str(error)
    return writing_trouble(folder) or (0, " ".join(str(error).split())[:200])


def _end_with(rank: int) -> None:
    """End this process when the one that forked it is gone."""
    while os.getppid() == rank:
        time.sleep(LOOK_SECONDS)
    os._exit(1)
