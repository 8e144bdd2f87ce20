"""A run whose layers are replayed is the eager run, bit for bit. Without a GPU a replay computes anew."""

import gc
from pathlib import Path
from typing import Any
from weakref import ReferenceType, WeakMethod, ref

import pytest
import torch

from megatron_sat import build
from megatron_sat.layers import graphed, recording
from megatron_sat.layers.choosing import RecordedChoice
from tests.helpers.command_line import PAPER
from tests.helpers.program import SPARSE, Text, start, trained

LADDER = f"{SPARSE} --sat-weights compact"  # .5 in steps 1 to 3, .25 in 4, dense from 5 on; four micro-batches
ONE_MICRO_BATCH = f"--micro-batch-size 8 --sat-schedule constant --sat-omission-rate 0.5 {PAPER}"
CASES = {
    "dense": "",
    "ladder": LADDER,
    "lagged": f"{LADDER} --sat-statistics lagged",
    "contribution": f"{LADDER} --sat-importance contribution",
    "known before": f"{LADDER} --sat-importance uniform",
    "one choice for two steps, rescaled": f"{LADDER} --sat-rescale inverse-keep --sat-selection-interval 2",
    "single heads": f"{LADDER} --sat-gqa head",
    "one micro-batch": f"{ONE_MICRO_BATCH} --sat-weights compact",
    "channels alone, ends whole": f"{LADDER} --sat-modules mlp --sat-whole-ends 1",
    "frozen": f"{LADDER} --sat-omitted-neurons frozen",
    "bf16, distributed optimizer": f"{LADDER} --bf16 --use-distributed-optimizer --overlap-grad-reduce",
}


class Counting:
    """A recorder that counts what it records, and the replays."""

    def __init__(self) -> None:
        self.recorded, self.forwards, self.backwards = 0, 0, 0
        self.launches, self.launched = 0, 0
        self._true = recording.RerunRecorder()

    def record(self, *args: Any, place: int) -> recording.Recording:
        self.recorded += 1
        return _Counted(self._true.record(*args, place=place), self)

    def record_launch(self, launch: recording.Launch, *, place: int) -> recording.Launch:
        self.launches += 1
        true = self._true.record_launch(launch, place=place)

        def counted() -> None:
            self.launched += 1
            true()

        return counted

    def __str__(self) -> str:
        replayed = f"{self.recorded} recorded, {self.forwards}/{self.backwards} replayed"
        return f"{replayed}; {self.launches} parts of choices recorded, {self.launched} replayed"


class _Counted:
    def __init__(self, true: recording.Recording, count: Counting) -> None:
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


@pytest.mark.parametrize("importance", ["maxip", "contribution"])
def test_two_replicas_replay_too(importance: str, text: Text, tmp_path: Path) -> None:
    flags = f"{LADDER} --use-distributed-optimizer --overlap-grad-reduce --sat-importance {importance}"
    runs = [
        trained(text.command(f"{flags} {graphs}"), tmp_path / f"{number}.jsonl", ranks=2)
        for number, graphs in enumerate(("--no-layer-graphs", "--layer-graphs"))
    ]
    assert runs[0] == runs[1]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    count = Counting()
    monkeypatch.setattr(build, "RerunRecorder", lambda: count)
    return count


def count_of(argv: list[str], count: object) -> str:
    """Trains and says what was replayed; forked ranks count for themselves."""
    monkey = pytest.MonkeyPatch()
    monkey.setattr("megatron_sat.pretrain.distributed.leave", lambda **_: print(count))
    try:
        return start(argv).out.splitlines()[-1]
    finally:
        monkey.undo()


def said(recorded: int, replayed: int, *, choices: int = 0, parts: int = 0) -> str:
    """What `Counting` says. Runs have seven steps of four micro-batches, and four layers: eight halves."""
    replays = f"{recorded} recorded, {replayed}/{replayed} replayed"
    return f"{replays}; {choices} parts of choices recorded, {parts} replayed"


def test_a_dense_run_replays_all_but_its_first_forward(text: Text, counting: Counting) -> None:
    assert count_of(text.command("--layer-graphs"), counting) == said(8, 8 * 27)


RUNGS = 2 * 4 + 3 * 4
"""Recordings: .5, .25 and dense, but attention keeps as many query groups at .25 as at .5."""
REPLAYS = 8 * (3 + 4 + 4) + (4 * 4 + 4 * 3) + 8 * 11
"""In steps 1 to 3, 4, and the dense 5 to 7: all but the first forward of each recording."""


def test_choices_are_replayed_too(text: Text, counting: Counting) -> None:
    """Each in two parts: in steps 2 and 3 of all halves, in step 4 of attention."""
    found = count_of(text.command(f"{LADDER} --layer-graphs"), counting)
    assert found == said(RUNGS, REPLAYS, choices=2 * 8, parts=2 * (8 + 8 + 4))


def test_what_is_known_before_need_not_be_chosen_by_replay(text: Text, counting: Counting) -> None:
    found = count_of(text.command(f"{LADDER} --sat-importance uniform --layer-graphs"), counting)
    assert found == said(RUNGS, REPLAYS)


def test_lagged_sums_are_measured_by_replay(text: Text, counting: Counting) -> None:
    """Eagerly in step 1, then in steps 2 and 3 for the next; after step 4 nothing is chosen any more."""
    found = count_of(text.command(f"{LADDER} --sat-statistics lagged --layer-graphs"), counting)
    assert found == said(RUNGS, REPLAYS, choices=2 * 8, parts=8 + 8)


def test_a_single_micro_batch_is_replayed_from_the_second_step_on(text: Text, counting: Counting) -> None:
    """Which chooses in every step."""
    one = f"{ONE_MICRO_BATCH} --sat-weights compact --layer-graphs"
    found = count_of(text.command(one, without="--micro-batch-size"), counting)
    assert found == said(8, 8 * 6, choices=2 * 8, parts=2 * 8 * 6)


def test_steps_that_gather_stay_eager(text: Text, counting: Counting) -> None:
    assert count_of(text.command(f"{SPARSE} --sat-weights gather --layer-graphs"), counting) == said(8, 8 * 11)


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
    assert "--layer-graphs has no effect with model parallelism, recomputation, dropout" in ended.err


@pytest.mark.parametrize("flags", ["", LADDER])
def test_an_evaluation_in_between_records_nothing_anew(flags: str, text: Text, counting: Counting) -> None:
    straight = count_of(text.command(f"{flags} --layer-graphs"), counting)
    assert count_of(text.command(f"{flags} --layer-graphs --eval-interval 2"), counting) == straight


class Weak(recording.RerunRecorder):
    """Holds what it records as a GPU's does: not what launched it."""

    def __init__(self) -> None:
        self.made: list[ReferenceType[RecordedChoice]] = []

    def record_launch(self, launch: recording.Launch, *, place: int) -> recording.Launch:
        held = WeakMethod(launch)
        return lambda: held()()  # type: ignore[misc]

    def choice(self, *args: Any, **named: Any) -> RecordedChoice:
        made = RecordedChoice(*args, **named)
        self.made.append(ref(made))
        return made

    def __str__(self) -> str:
        return f"{len(self.made)} made, {sum(each() is not None for each in self.made)} there"


def test_a_rungs_recorded_choices_go_with_it(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the collection of garbage: a rung's packed weights would stay beside those of the next until then."""
    weak = Weak()
    monkeypatch.setattr(build, "RerunRecorder", lambda: gc.disable() or weak)
    monkeypatch.setattr(graphed, "RecordedChoice", weak.choice)
    assert count_of(text.command(f"{LADDER} --layer-graphs"), weak) == "8 made, 0 there"


class Living:
    """Something that a pool can hold weakly."""


def test_a_pool_whose_recordings_are_gone_is_not_used_again() -> None:
    """The allocator ends a pool with its last graph, and refuses its handle from then on."""
    handles = iter("abc")
    pool = recording.SharedPool(lambda: next(handles))
    first, second = Living(), Living()
    for place, one in enumerate((first, second)):
        assert pool.handle(place=place) == "a"
        pool.joined_by(one, place=place)
    del first, one
    assert pool.handle(place=1) == "a"
    del second
    assert pool.handle(place=0) == "b"


def test_what_is_recorded_out_of_order_does_not_share_memory() -> None:
    """Attention keeps its recordings where a rung changes the MLP alone, whose new ones come after them."""
    handles = iter("abc")
    pool = recording.SharedPool(lambda: next(handles))
    keeps: dict[int, Living] = {}

    def record(place: int) -> str:
        handle: str = pool.handle(place=place)
        keeps[place] = Living()
        pool.joined_by(keeps[place], place=place)
        return handle

    assert [record(place) for place in range(4)] == ["a"] * 4
    assert [record(place) for place in (1, 3)] == ["b"] * 2
    assert [record(place) for place in (3, 1)] == ["b", "c"]


def test_a_frozen_half_stays_eager() -> None:
    linear = torch.nn.Linear(2, 2).requires_grad_(requires_grad=False)
    half = graphed.Half([linear], pair=Any, forward=linear, recorder=Counting(), place=0)  # type: ignore[arg-type]
    hidden = torch.ones(1, 1, 2, requires_grad=True)
    assert half(hidden, {}).equal(linear(hidden))
