"""--async-save: the run that it would be without, whose checkpoints are whole a little later."""

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_sat import log, pretrain
from megatron_sat.checkpoint import background
from megatron_sat.checkpoint.folder import folder_of, iterations
from megatron_sat.training.visits import load_visits
from tests.helpers.killing import job
from tests.helpers.program import SPARSE, Text, digests, open_session, read_records, start, trained
from tests.helpers.ranks import run_ranks
from tests.program.test_bad_steps import nan, run_spoilt, spoil
from tests.program.test_killing import check_killed
from tests.program.test_stopping import HANDLED, asked_in

ASYNC = "--async-save --save-interval 2"
RUN = f"{SPARSE} --sat-statistics lagged --hidden-dropout 0.1 --use-distributed-optimizer"
PATIENCE = 120.0
SLOW = 0.5


@pytest.fixture
def slow_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file takes longer than some steps do."""
    true = background.write_file

    def write_file(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SLOW)
        return true(*args, **kwargs)

    monkeypatch.setattr(background, "write_file", write_file)


def contents(_: int, root: Path) -> dict[int, dict[str, bytes]]:
    """Every tensor of every checkpoint by step."""
    found = {}
    for step in iterations(root):
        held = dist_checkpointing.load_plain_tensors(str(folder_of(root, step)))
        tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        found[step] = {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
    return found


def steps_of(root: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted(root.glob("iter_*"))]


LAYOUTS = {
    "one rank": (1, f"{SPARSE} --sat-importance contribution --sat-selection-interval 3"),
    "dp 2, distributed optimizer": (2, f"{RUN} --overlap-grad-reduce --overlap-param-gather"),
    "tp 2": (2, f"{SPARSE} --tensor-model-parallel-size 2 --sequence-parallel"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "one rank" else pytest.mark.slow) for case in LAYOUTS]
)
def test_the_run_and_all_its_checkpoints_are_those_of_saving_at_once(case: str, text: Text, tmp_path: Path) -> None:
    """Bit for bit, and resumed from the middle."""
    ranks, flags = LAYOUTS[case]
    at_once, later = tmp_path / "plain", tmp_path / "later"
    (plain, other) = (
        trained(
            text.command(f"{flags} --save {folder} {more} --save-interval 2"), folder / "metrics.jsonl", ranks=ranks
        )
        for folder, more in ((at_once, ""), (later, "--async-save"))
    )
    assert other == plain
    assert steps_of(later) == [2, 4, 6, 7]
    assert run_ranks(contents, 1, later) == run_ranks(contents, 1, at_once)
    assert load_visits(later / "visits.npz").steps == 7
    argv = text.command(f"{flags} {ASYNC} --save {later} --load {later} --ckpt-step 4")
    assert trained(argv, later / "metrics.jsonl", ranks=ranks) == plain
    assert not list(later.glob("*.unfinished"))


def test_a_second_save_waits_for_the_first_and_each_is_said_when_it_is_whole(
    text: Text, slow_writers: None, tmp_path: Path
) -> None:
    argv = text.command(f"--async-save --save-interval 1 --train-iters 3 --save-keep-last 2 --save {tmp_path}")
    ended = start(argv, ranks=2)
    assert ended.codes == [0, 0], ended.err
    said = [line for line in ended.out.splitlines() if "saved to" in line]
    assert [line.split("in the background within ")[0] for line in said] == [
        f"step      {step} | saved to {tmp_path} " for step in (1, 2, 3)
    ]
    assert all(float(line.split()[-2]) >= SLOW for line in said)
    assert steps_of(tmp_path) == [2, 3]


def training_goes_on(_: int, argv: list[str]) -> list[list[int]]:
    """The checkpoints there are as each step begins. Writers write when step 4 has begun."""
    session = open_session(argv)
    folder = session.folder
    assert folder is not None
    true, found, write = session.run.engine.train_step, [], background.write_file

    def train_step(*args: Any, **kwargs: Any) -> Any:
        found.append(iterations(folder))
        if len(found) == 4:
            (folder / "go").touch()
        return true(*args, **kwargs)

    def write_file(*args: Any, **kwargs: Any) -> Any:
        while not (folder / "go").exists():
            time.sleep(0.01)
        return write(*args, **kwargs)

    background.write_file = write_file

    session.run.engine.train_step = train_step  # type: ignore[method-assign]
    session.train()
    return found


def test_training_goes_on_while_a_checkpoint_is_written(text: Text, tmp_path: Path) -> None:
    """Steps 3 and 4 begin before that of step 2 is whole; saved at once it is whole before."""
    argv = text.command(f"--save-interval 2 --train-iters 4 --save {tmp_path}")
    assert run_ranks(training_goes_on, 1, [*argv, "--async-save"]) == [[[], [], [], []]]
    assert steps_of(tmp_path) == [2, 4]
    argv = text.command(f"--save-interval 2 --train-iters 4 --save {tmp_path / 'plain'}")
    assert run_ranks(training_goes_on, 1, argv) == [[[], [], [2], [2]]]


def test_a_signal_while_writing_ends_the_run_when_both_checkpoints_are_whole(
    text: Text, slow_writers: None, tmp_path: Path
) -> None:
    argv = text.command(f"{ASYNC} --save {tmp_path} --load {tmp_path} {HANDLED}")
    assert [one[:3] for one in run_ranks(asked_in, 2, argv, 3, by=1)] == [(75, 3, True)] * 2
    assert steps_of(tmp_path) == [2, 3]


def test_a_rollback_goes_back_to_what_was_still_being_written(text: Text, slow_writers: None, tmp_path: Path) -> None:
    flags = "--on-bad-step rollback --hidden-dropout 0.1 --save-interval 2"
    later, at_once = (
        run_ranks(run_spoilt, 1, text.command(f"{flags} {more} --save {tmp_path / name}"), nan, steps={5}, rank=0)
        for name, more in (("later", "--async-save"), ("plain", ""))
    )
    assert later == at_once
    assert [(code, bad) for code, _, bad in later] == [(0, 1)]


def test_a_bad_step_ends_the_run_when_the_checkpoint_before_it_is_whole(
    text: Text, slow_writers: None, tmp_path: Path
) -> None:
    ended = run_ranks(run_spoilt, 2, text.command(f"{ASYNC} --save {tmp_path}"), nan, steps={3})
    assert all("step 3: the loss is nan" in str(word) and "Besides" not in str(word) for word, *_ in ended)
    assert steps_of(tmp_path) == [2]


def broken_from(step: int) -> Any:
    """Writers that cannot write from then on."""
    true = background.write_file

    def write_file(bucket: background.Bucket, **kwargs: Any) -> Any:
        if int(Path(bucket[0]).parent.name[5:12]) >= step:
            return OSError(28, "No space left on device")
        return true(bucket, **kwargs)

    return write_file


def test_a_bad_step_and_a_checkpoint_lost_are_both_said(
    text: Text, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(background, "write_file", broken_from(2))
    argv = text.command(f"{ASYNC} --save {tmp_path}")
    ((said, *_),) = run_ranks(_spoilt_before_noticed, 1, argv)
    assert "step 3: the loss is nan" in said
    assert "Besides, the checkpoint of step 2 must be written to" in said and "No space left on device" in said


def _spoilt_before_noticed(rank: int, argv: list[str]) -> tuple[str]:
    session = open_session(argv)
    spoil(session, nan, steps={3}, rank=0)
    with pytest.raises(pretrain.BadStep) as end:
        session.train()
    return (str(end.value),)


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_full_disk_is_said_when_it_is_noticed_and_at_the_latest_at_the_end(
    last: bool, text: Text, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(background, "write_file", broken_from(7 if last else 4))
    argv = text.command(f"{ASYNC} --save {tmp_path} --load {tmp_path}")
    ended = start(argv, ranks=2)
    assert ended.codes == [4, 4]
    (line,) = ended.err.splitlines()
    step, whole = (7, 6) if last else (4, 2)
    assert line == (
        f"error: the checkpoint of step {step} must be written to {tmp_path}, it cannot: rank 0: No space left on "
        f"device; make room or choose another --save; that of step {whole} is whole: resume from it"
    )
    assert steps_of(tmp_path)[-1] == whole and not list(tmp_path.glob("*.unfinished"))


def crashes(_: int, argv: list[str]) -> tuple[list[str], list[str]]:
    """What a rank leaves that crashes while it writes: folders and processes."""
    session = open_session(argv)
    true, done = session.run.engine.train_step, 0

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == 3:
            raise RuntimeError("a crash")
        return true(*args, **kwargs)

    session.run.engine.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a crash"):
        session.train()
    assert session.folder is not None
    return [path.name for path in session.folder.glob("iter_*")], [p.name() for p in psutil.Process().children()]


def test_a_crash_gives_up_what_is_being_written(text: Text, slow_writers: None, tmp_path: Path) -> None:
    argv = text.command(f"{ASYNC} --save {tmp_path}")
    assert run_ranks(crashes, 1, argv) == [(["iter_0000002.unfinished"], [])]


@pytest.fixture
def a_run_killed_while_writing(text: Text, slow_writers: None, tmp_path: Path) -> list[str]:
    argv = text.command(f"{RUN} {ASYNC} --save {tmp_path} --load {tmp_path} --train-iters 6")
    with job(pretrain.main, argv, ranks=2) as running:
        end = time.monotonic() + PATIENCE
        while not (tmp_path / "iter_0000004.unfinished").exists() and time.monotonic() < end:
            time.sleep(0.01)
        running.kill(1, signal.SIGKILL)
        assert running.wait(PATIENCE) != [0, 0]
    return argv


def weights(_: int, argv: list[str]) -> dict[str, str]:
    session = open_session(argv)
    session.train()
    return digests(session)


def test_kill_9_while_writing_leaves_the_checkpoint_before_it(
    text: Text, a_run_killed_while_writing: list[str], tmp_path: Path
) -> None:
    assert iterations(tmp_path) == [2]
    undisturbed = run_ranks(weights, 2, text.command(f"{RUN} --train-iters 6"))
    assert run_ranks(weights, 2, a_run_killed_while_writing) == undisturbed
    assert [line["step"] for line in read_records(tmp_path / "metrics.jsonl")] == list(range(1, 7))
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one(text: Text, tmp_path: Path) -> None:
    check_killed(text, tmp_path, kills=20, steps=40, seed=3, more="--async-save")


def said_by(_: int, argv: list[str]) -> str:
    said: list[str] = []
    log.say = said.append  # type: ignore[assignment]
    open_session(argv).train()
    return "\n".join(said)


def test_saving_at_once_says_nothing_of_a_background(text: Text, tmp_path: Path) -> None:
    (said,) = run_ranks(said_by, 1, text.command(f"--save {tmp_path} --train-iters 1 --lr-warmup-iters 0"))
    assert f"step      1 | saved to {tmp_path}" in said.splitlines()
