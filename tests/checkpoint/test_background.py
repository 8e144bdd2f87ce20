"""Saving while training goes on: the saved step's values, a name only for what is whole, no writer without its rank."""

import errno
import gc
import os
import resource
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_sat.checkpoint import background
from megatron_sat.checkpoint.background import Writer, copied
from megatron_sat.checkpoint.folder import TRACKER, folder_of, iterations, unfinished_of
from megatron_sat.checkpoint.resume import open_checkpoint
from megatron_sat.checkpoint.saving import NotSaved, begin_checkpoint
from tests.checkpoint.runs import BF16, LATE, begin, header, save
from tests.helpers.plain_engine import make_engine, train
from tests.helpers.ranks import run_ranks

SECONDS = 20.0
"""For anything that must happen, on a busy machine."""


def slow(wait: Callable[[], None]) -> None:
    """Let this process' writers wait before each file."""
    true = background.write_file

    def write_file(*args: Any, **kwargs: Any) -> Any:
        wait()
        return true(*args, **kwargs)

    background.write_file = write_file


def until(path: Path) -> Callable[[], None]:
    """Waits for a file to be there."""

    def wait() -> None:
        end = time.monotonic() + SECONDS
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.01)

    return wait


def seen(condition: Callable[[], bool]) -> bool:
    """Whether it comes to pass in time."""
    end = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def contents(folder: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint."""
    held = dist_checkpointing.load_plain_tensors(str(folder))
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    return {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def both_ways(rank: int, settings: dict[str, Any], root: Path) -> tuple[dict[str, bytes], dict[str, bytes], int]:
    """The checkpoint of step 2, written at once, and written after three more steps; and what step 5 changed of it."""
    engine, layout = make_engine(**settings)
    train(engine, layout, steps=range(2))
    save(engine, layout, root / "at once", iteration=2)
    go = root / "go"
    slow(until(go))
    unfinished = begin(engine, layout, root / "later", iteration=2)
    train(engine, layout, steps=range(2, 5))
    assert iterations(root / "later") == [], "nothing looks like a checkpoint"
    assert unfinished.writing
    dist.barrier()
    go.touch()
    assert unfinished.finish() == folder_of(root / "later", 2)
    assert psutil.Process().children() == [], "no process is left"
    save(engine, layout, root / "later", iteration=5)
    at_once, later, changed = (
        contents(folder_of(root / name, step)) for name, step in (("at once", 2), ("later", 2), ("later", 5))
    )
    return at_once, later, sum(changed[name] != later[name] for name in later)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tp 2, bf16": (2, {"tp": 2, "model": BF16}),
    "dp 2, distributed optimizer, overlapped": (2, {"ddp": LATE}),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_is_written_later_is_what_was_when_it_began(case: str, tmp_path: Path) -> None:
    """Bit for bit, although every tensor has changed before the first byte is written."""
    ranks, settings = LAYOUTS[case]
    for at_once, later, changed in run_ranks(both_ways, ranks, settings, tmp_path):
        assert later == at_once
        assert changed > len(later) // 2


def one_is_late(rank: int, root: Path) -> list[Any]:
    """What is there while rank 1 alone still writes, and what after."""
    engine, layout = make_engine()
    save(engine, layout, root, iteration=1)
    go = root / "go"
    if rank == 1:
        slow(until(go))
    unfinished = begin(engine, layout, root, iteration=2, keep_last=1)
    if rank == 0:
        assert seen(lambda: not unfinished.writing), "rank 0 is done"
    dist.barrier()
    found = [unfinished.writing, iterations(root), (root / TRACKER).read_text(), unfinished_of(root, 2).is_dir()]
    found.append((unfinished_of(root, 2) / "metadata.json").exists())
    dist.barrier()
    go.touch()
    unfinished.finish()
    return [*found, iterations(root), (root / TRACKER).read_text(), unfinished_of(root, 2).exists()]


def test_no_marker_and_no_deletion_before_the_last_rank_has_written(tmp_path: Path) -> None:
    first, second = run_ranks(one_is_late, 2, tmp_path)
    before, after = [[1], "1", True, False], [[2], "2", False]
    assert first == [False, *before, *after]
    assert second == [True, *before, *after]


def no_memory() -> Any:
    """A way to start processes that finds no memory for them."""

    class Process(background._FORK.Process):  # type: ignore[name-defined, misc]
        def start(self) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    return SimpleNamespace(Pipe=background._FORK.Pipe, Process=Process)


def in_trouble(rank: int, root: Path, cause: str) -> tuple[str, list[int], bool]:
    """What a rank says of a checkpoint of which rank 1 could not write its part."""
    engine, layout = make_engine()
    save(engine, layout, root, iteration=1)
    if rank == 1 and cause == "killed":
        slow(until(root / "never"))
    if rank == 1 and cause == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))
    if rank == 1 and cause == "not forked":
        background._FORK = no_memory()
    if rank == 1 and cause == "fault":
        background.write_file = lambda *args, **kwargs: ValueError("a fault of another kind")
    unfinished = begin(engine, layout, root, iteration=2)
    if rank == 1 and cause == "killed":
        (writer,) = psutil.Process().children()
        writer.kill()
    with pytest.raises(NotSaved) as refusal:
        unfinished.finish()
    return str(refusal.value), iterations(root), unfinished_of(root, 2).exists()


SAID = {
    "not forked": "rank 1: no process can be forked to write it: Cannot allocate memory",
    "killed": "rank 1: the process that wrote it was killed by signal 9",
    "full": f"rank 1: {os.strerror(errno.EFBIG)}",
    "fault": "rank 1: a fault of another kind",
}


@pytest.mark.parametrize("cause", SAID)
def test_what_one_rank_cannot_write_is_said_on_all_and_the_checkpoint_before_stands(cause: str, tmp_path: Path) -> None:
    for said, whole, left in run_ranks(in_trouble, 2, tmp_path, cause):
        assert said == (
            f"the checkpoint of step 2 must be written to {tmp_path}, it cannot: {SAID[cause]}; make room or choose "
            "another --save; that of step 1 is whole: resume from it"
        )
        assert (whole, left) == ([1], False)


def nowhere(rank: int, root: Path) -> str:
    engine, layout = make_engine()
    (root / "in the way").touch()
    with pytest.raises(NotSaved) as refusal:
        begin(engine, layout, root / "in the way", iteration=1)
    with pytest.raises(ValueError, match="--save-keep-last must be at least 1, got 0"):
        begin(engine, layout, root, iteration=1, keep_last=0)
    return str(refusal.value)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    for said in run_ranks(nowhere, 2, tmp_path):
        assert "it cannot: File exists; make room" in said and said.endswith("none is there yet: start again")


def still_held(rank: int, root: Path) -> tuple[bool, int]:
    """Whether memory that was taken for the checkpoint alone is kept while it is written; and what was read of it."""
    engine, layout = make_engine()
    slow(until(root / "go"))
    made = torch.arange(7)
    name, memory = "sat.made", StorageWeakRef(made.untyped_storage())
    unfinished = begin_checkpoint(root, trainer=engine, header=header(1), tensors={name: made}, layout=layout)
    del made
    gc.collect()
    alive = not memory.expired()
    (root / "go").touch()
    return alive, int(dist_checkpointing.load_plain_tensors(str(unfinished.finish()))[name].sum())


def test_nothing_of_a_step_is_kept_in_memory_for_its_writer(tmp_path: Path) -> None:
    """On a device under ZeRO 3 it would be the whole model."""
    assert run_ranks(still_held, 1, tmp_path) == [(False, 21)]


def asked_to_end(rank: int, root: Path) -> int:
    engine, layout = make_engine()
    slow(until(root / "go"))
    unfinished = begin(engine, layout, root, iteration=1)
    (writer,) = psutil.Process().children()
    assert seen(lambda: len(writer.threads()) > 1), "it watches its rank"
    for asks in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        writer.send_signal(asks)
    (root / "go").touch()
    unfinished.finish()
    return open_checkpoint(root).iteration


def test_a_writer_is_deaf_to_what_asks_its_run_to_end(tmp_path: Path) -> None:
    """Slurm's signal reaches every process of a job."""
    assert run_ranks(asked_to_end, 1, tmp_path) == [1]


def given_up(rank: int, root: Path) -> tuple[bool, list[str]]:
    engine, layout = make_engine()
    slow(until(root / "never"))
    unfinished = begin(engine, layout, root, iteration=1)
    (writer,) = psutil.Process().children()
    unfinished.discard()
    unfinished.discard()  # again: nothing
    gone, there = not writer.is_running(), [path.name for path in root.glob("iter_*")]
    save(engine, layout, root, iteration=2)
    return gone, there


def test_a_checkpoint_given_up_is_none_and_goes_with_the_next(tmp_path: Path) -> None:
    assert run_ranks(given_up, 1, tmp_path) == [(True, ["iter_0000001.unfinished"])]
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"]


def test_a_writer_ends_when_its_rank_is_killed(tmp_path: Path) -> None:
    """Or it might write on in a folder that the resumed run has made anew."""
    reader, pen = os.pipe()
    pid = os.fork()
    if pid == 0:
        slow(until(tmp_path / "never"))
        request = SimpleNamespace(async_fn=partial(print, []), async_fn_args=[0, [("", "", ([], []))], None])
        Writer(request, folder=tmp_path)
        os.write(pen, str(psutil.Process().children()[0].pid).encode())
        time.sleep(SECONDS)
        os._exit(0)
    writer = psutil.Process(int(os.read(reader, 20)))
    assert writer.is_running() and seen(lambda: len(writer.threads()) > 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert seen(lambda: not writer.is_running() or writer.status() == psutil.STATUS_ZOMBIE)


def bucket(tensor: Tensor) -> background.Bucket:
    return "path", "name", ([], [("item", tensor)])


def pointer(of: background.Bucket) -> int:
    return of[2][1][0][1].data_ptr()


def test_only_memory_that_a_fork_shares_is_copied() -> None:
    own, shared = torch.arange(4.0), torch.arange(4.0).share_memory_()
    assert pointer(copied(bucket(own))) == own.data_ptr()
    kept = copied(bucket(shared))
    assert pointer(kept) != shared.data_ptr()
    shared.zero_()
    assert kept[2][1][0][1].tolist() == [0, 1, 2, 3]


def shared_and_changed(rank: int, root: Path) -> bool:
    """Whether a parameter in shared memory is written as it was."""
    engine, layout = make_engine()
    parameter = next(engine.chunks[0].parameters())
    parameter.data = parameter.data.share_memory_()
    before = parameter.detach().clone()
    slow(until(root / "go"))
    unfinished = begin(engine, layout, root, iteration=1)
    parameter.data.zero_()
    (root / "go").touch()
    tensors = dist_checkpointing.load_plain_tensors(str(unfinished.finish()))
    return any(isinstance(t, Tensor) and torch.equal(t, before) for t in tensors.values())


def test_a_tensor_that_the_writer_shares_is_written_as_it_was(tmp_path: Path) -> None:
    assert run_ranks(shared_and_changed, 1, tmp_path) == [True]


def test_a_rank_without_anything_to_write_is_done_at_once(tmp_path: Path) -> None:
    writer = Writer(SimpleNamespace(async_fn=None, async_fn_args=[]), folder=tmp_path)
    assert not writer.busy and writer.wait() is None
    writer.hand_over()
    writer.kill()
    assert writer.wait() is None
