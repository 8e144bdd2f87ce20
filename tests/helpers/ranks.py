"""Several gloo ranks in a test: forked from the process that has imported everything (1 s, not 15)."""

import contextlib
import faulthandler
import io
import multiprocessing.util
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sat import faults


def _child(rank: int, size: int, store: str, timeout: int, out: int, call: Callable[[], Any]) -> None:
    stacks = Path(f"{store}.stacks{rank}").open("w")  # noqa: SIM115  open until the rank ends
    faulthandler.enable(file=stacks)
    faulthandler.dump_traceback_later(timeout - 1, file=stacks)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's handler never runs in a rank that hangs in C
    signal.alarm(timeout)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        faults.apply_all()  # as in the program
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            answer = (True, call())
        if dist.is_initialized():
            dist.barrier()  # a rank that left now would break off groups that the others still make
        payload = pickle.dumps(answer)
    except BaseException:  # noqa: BLE001  the parent shows it, whatever it is
        answer = (False, traceback.format_exc())
        payload = pickle.dumps(answer)
    multiprocessing.util._exit_function()  # os._exit skips what atexit would do for its children
    with os.fdopen(out, "wb") as pipe:
        pipe.write(payload)
    os._exit(0 if answer[0] else 1)


def _last_word(exit_code: int, timeout: int) -> str:
    if exit_code == -signal.SIGALRM:
        return f"hung: its alarm rang after {timeout} s"
    return f"died without a word of {signal.Signals(-exit_code).name if exit_code < 0 else f'exit {exit_code}'}"


def run_ranks(fn: Callable[..., Any], n: int, *args: Any, timeout: int = 120, **kw: Any) -> list[Any]:
    """Run ``fn(rank, *args, **kw)`` on n forked gloo ranks; the list of what they return, by rank.

    The default process group exists, megatron's parallel_state does not. Raises RuntimeError with the
    traceback of every rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pids, pipes = [], []
        for rank in range(n):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                _child(rank, n, store, timeout, writer, partial(fn, rank, *args, **kw))
            os.close(writer)
            pids.append(pid)
            pipes.append(reader)
        answers = []
        for reader in pipes:
            with os.fdopen(reader, "rb") as pipe:
                payload = pipe.read()
            answers.append(pickle.loads(payload) if payload else None)
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        stacks = [Path(f"{store}.stacks{rank}") for rank in range(n)]
        hung = [path.read_text() if path.exists() else "" for path in stacks]
    answers = [answer or (False, _last_word(end, timeout)) for answer, end in zip(answers, ends, strict=True)]
    failed = [f"rank {rank}:\n{answer}\n{hung[rank]}" for rank, (ok, answer) in enumerate(answers) if not ok]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [answer for _, answer in answers]
