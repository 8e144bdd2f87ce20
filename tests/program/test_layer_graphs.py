"""A run whose layers are replayed is the eager run, bit for bit. Without a GPU a replay computes anew."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sat import build
from megatron_sat.layers import graphed
from tests.helpers.program import SPARSE, Text, read_records, start, trained

LADDER = f"{SPARSE} --sat-weights compact"  # .5 in steps 1 to 3, .25 in 4, dense from 5 on; four micro-batches
CASES = {
    "dense": "",
    "ladder": LADDER,
    "lagged": f"{LADDER} --sat-statistics lagged",
    "contribution": f"{LADDER} --sat-importance contribution",
    "known before": f"{LADDER} --sat-importance uniform",
    "one choice for two steps, rescaled": f"{LADDER} --sat-rescale inverse-keep --sat-selection-interval 2",
    "single heads": f"{LADDER} --sat-gqa head",
    "frozen": f"{LADDER} --sat-omitted-neurons frozen",
    "bf16, distributed optimizer": f"{LADDER} --bf16 --use-distributed-optimizer --overlap-grad-reduce",
}


class Counting:
    """Recordings that are counted, and their replays."""

    def __init__(self) -> None:
        self.recorded, self.forwards, self.backwards = 0, 0, 0

    def __call__(self, *args: Any) -> graphed.Recording:
        self.recorded += 1
        return _Counted(graphed.RERUN(*args), self)


class _Counted:
    def __init__(self, true: graphed.Recording, count: Counting) -> None:
        self._true, self._count = true, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._true, name)

    def forward(self) -> None:
        self._count.forwards += 1
        self._true.forward()

    def backward(self) -> None:
        self._count.backwards += 1
        self._true.backward()


@pytest.mark.parametrize("case", CASES)
def test_replayed_and_eager_runs_are_equal(case: str, text: Text, tmp_path: Path) -> None:
    runs = [
        trained(text.command(f"{CASES[case]} --eval-interval 2 {graphs}"), tmp_path / f"{number}.jsonl")
        for number, graphs in enumerate(("--no-layer-graphs", "--layer-graphs"))
    ]
    assert runs[0] == runs[1]


def test_two_replicas_replay_too(text: Text, tmp_path: Path) -> None:
    flags = f"{LADDER} --use-distributed-optimizer --overlap-grad-reduce"
    runs = [
        trained(text.command(f"{flags} {graphs}"), tmp_path / f"{number}.jsonl", ranks=2)
        for number, graphs in enumerate(("--no-layer-graphs", "--layer-graphs"))
    ]
    assert runs[0] == runs[1]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    count = Counting()
    monkeypatch.setattr(build, "RERUN", count)
    return count


def count_of(argv: list[str], count: Counting) -> str:
    """Trains and says what was replayed; forked ranks count for themselves."""

    def say() -> None:
        print(f"recorded {count.recorded}, replayed {count.forwards}/{count.backwards}")

    monkey = pytest.MonkeyPatch()
    monkey.setattr("megatron_sat.pretrain.distributed.leave", lambda **_: say())
    try:
        return start(argv).out.splitlines()[-1]
    finally:
        monkey.undo()


def test_what_is_replayed(text: Text, counting: Counting) -> None:
    """Four layers, four micro-batches, seven steps; the first micro-batch of a sparse step chooses, eagerly."""
    whole = count_of(text.command("--layer-graphs"), counting)
    assert whole == f"recorded 4, replayed {4 * 27}/{4 * 27}"  # all but the very first
    ladder = count_of(text.command(f"{LADDER} --layer-graphs"), counting)
    replays = 4 * (3 * 4 + 2 * 4 + 3)  # three a sparse step, four a dense one, but for the first
    assert ladder == f"recorded {3 * 4}, replayed {replays}/{replays}"
    random = f"{LADDER} --sat-importance uniform --layer-graphs"
    replays += 4 * 2  # which looks at no token: steps 2 and 3 know their choice before; step 4 has new shapes
    lagged = count_of(text.command(random), counting)
    assert lagged == f"recorded {3 * 4}, replayed {replays}/{replays}"
    gathered = count_of(text.command(f"{SPARSE} --sat-weights gather --layer-graphs"), counting)
    assert gathered == f"recorded 4, replayed {4 * 11}/{4 * 11}"  # sparse steps stay eager


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("--tensor-model-parallel-size 2", 2),
        ("--hidden-dropout 0.1", 1),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1),
        ("--no-gradient-accumulation-fusion", 1),
        ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 2),
    ],
)
def test_where_a_layer_cannot_be_replayed_it_is_said(flags: str, ranks: int, text: Text) -> None:
    ended = start(text.command(f"--layer-graphs {flags}"), ranks=ranks)
    assert ended.codes == [2] * ranks
    assert "--layer-graphs has no effect with model parallelism, recomputation, dropout, biases" in ended.err


def test_an_evaluation_in_between_records_nothing_anew(text: Text, counting: Counting) -> None:
    whole = count_of(text.command("--layer-graphs --eval-interval 2"), counting)
    assert whole == f"recorded 4, replayed {4 * 27}/{4 * 27}"


def test_a_pool_whose_recordings_are_gone_is_not_used_again() -> None:
    """The allocator ends a pool with its last graph, and refuses its handle from then on."""
    handles = iter("abc")
    pool = graphed.SharedPool(lambda: next(handles))
    first, second = Counting(), Counting()
    for recording in (first, second):
        assert pool.handle() == "a"
        pool.joined_by(recording)
    del first, recording
    assert pool.handle() == "a"
    del second
    assert pool.handle() == "b"


def test_a_frozen_layer_stays_eager(text: Text) -> None:
    layer = graphed.GraphedLayer.__new__(graphed.GraphedLayer)
    torch.nn.Module.__init__(layer)
    layer.record = graphed.RERUN
    layer.frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    assert layer._key(torch.zeros(1, 1, 1, requires_grad=True)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["dense", "ladder", "lagged"])
@pytest.mark.parametrize("evaluated", ["", "--eval-interval 2"], ids=["straight", "evaluated"])
def test_cuda_graphs_and_eager_runs_are_equal(evaluated: str, case: str, text: Text, tmp_path: Path) -> None:
    """Runs in one process of its own each: forked ranks have no CUDA."""
    found = []
    for number, graphs in enumerate(("--no-layer-graphs", "--layer-graphs")):
        log = tmp_path / f"{number}.jsonl"
        flags = f"{CASES[case]} --bf16 --seq-length 128 --max-position-embeddings 128 {graphs} {evaluated}"
        flags += f" --log-jsonl {log}"
        flags += " --sat-channel-multiple 8" if CASES[case] else ""
        argv = text.command(flags, without="--seq-length --max-position-embeddings")
        command = [sys.executable, "pretrain_sat.py", *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr[-3000:]
        found.append([(line["loss"], line["grad_norm"]) for line in read_records(log)])
    for eager, replayed in zip(*found, strict=True):
        assert replayed == pytest.approx(eager, rel=1e-3)
