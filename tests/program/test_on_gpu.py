"""The whole program's step on a GPU: the host asks and does not wait."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import pytest
import torch

from megatron_sat import cli
from megatron_sat.build import Run, build_run
from megatron_sat.distributed import Launch, join, leave
from megatron_sat.engines import megatron
from megatron_sat.training.reading import Reader
from tests.helpers.program import LADDER, Text
from tests.program.test_layer_graphs import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """CUDA is initialised with megatron's import, so no rank can be forked."""
    join(Launch(rank=0, world_size=1, local_rank=0), backend="nccl", timeout_minutes=1)
    yield
    leave()


def steps_of(run: Run, count: int, *, evaluated: bool = False) -> list[tuple[float, float]]:
    """The first steps of training, each on its own micro-batches: (loss, gradient norm) of each.

    evaluated: with an evaluation after every second.
    """
    found = []
    training = run.config.training
    assert run.datasets.train is not None
    reader = Reader(layout=run.layout, device=run.device, micro_batch_size=training.micro_batch_size)
    read = reader.train(run.datasets.train, consumed_samples=0, num_workers=0)
    for step in range(1, count + 1):
        batches = list(islice(read, training.num_micro_batches))
        controller = run.controller
        with nullcontext() if controller is None else controller.step(step, micro_batches=training.num_micro_batches):
            result = run.engine.train_step(iter(batches), num_micro_batches=training.num_micro_batches)
        found.append((float(result.loss), float(result.grad_norm)))
        if evaluated and step % 2 == 0:
            run.engine.evaluate(iter(batches), num_micro_batches=len(batches))
    return found


@pytest.mark.parametrize("graphs", ["--layer-graphs", "--no-layer-graphs"])
@pytest.mark.parametrize("importance", ["maxip", "contribution"])
@pytest.mark.parametrize("statistics", ["fresh", "lagged"])
def test_forward_and_backward_never_wait_for_the_gpu(
    statistics: str, importance: str, graphs: str, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the steps after the first, all micro-batches; the update behind them asks for the norm, once."""
    flags = f"{LADDER} --bf16 --sat-channel-multiple 8 --sat-importance {importance} --sat-statistics {statistics}"
    run = build_run(cli.parse(text.command(f"{flags} {graphs}"), world_size=1, cuda=True))
    steps_of(run, 2)  # compiles, records
    true, watched = megatron.get_forward_backward_func, []

    def watching() -> Any:
        schedule = true()

        def strictly(**named: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return schedule(**named)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                watched.append(True)

        return strictly

    monkeypatch.setattr(megatron, "get_forward_backward_func", watching)
    steps_of(run, 3)
    assert len(watched) == 3


@pytest.mark.parametrize("case", ["dense", "ladder", "lagged", "known before", "channels alone, ends whole"])
@pytest.mark.parametrize("evaluated", [False, True], ids=["straight", "evaluated"])
def test_cuda_graphs_and_eager_runs_are_equal(evaluated: bool, case: str, text: Text) -> None:
    """Seven steps through two rungs. In bf16, where the same kernels run in another order of memory."""
    found = []
    for graphs in ("--no-layer-graphs", "--layer-graphs"):
        flags = f"{CASES[case]} --bf16 --seq-length 128 --max-position-embeddings 128 {graphs}"
        flags += " --sat-channel-multiple 8" if CASES[case] else ""
        argv = text.command(flags, without="--seq-length --max-position-embeddings")
        found.append(steps_of(build_run(cli.parse(argv, world_size=1, cuda=True)), 7, evaluated=evaluated))
        leave()
        join(Launch(rank=0, world_size=1, local_rank=0), backend="nccl", timeout_minutes=1)
    for eager, replayed in zip(*found, strict=True):
        assert replayed == pytest.approx(eager, rel=1e-3)
