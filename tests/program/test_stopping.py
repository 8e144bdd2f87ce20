"""A run that is asked to save or to end, by signal or by file, does so on all ranks after the step under way."""

import os
import signal
from pathlib import Path

import pytest

from megatron_sat.checkpoint.resume import open_checkpoint
from megatron_sat.engines.base import StepResult
from megatron_sat.training import requests
from megatron_sat.training.requests import SAVE_FILE, STOP_FILE
from tests.helpers.program import Text, digests, open_session, read_records, start
from tests.helpers.ranks import run_ranks

HANDLED = "--exit-signal-handler --exit-signal SIGUSR1"


def asked_in(rank: int, argv: list[str], step: int, *, by: Path | int) -> tuple[int, int, bool, dict[str, str]]:
    """In ``step`` a file appears, or rank ``by`` gets a signal: exit code, steps, whether the last ended, weights."""
    requests.LOOK_SECONDS = 0.0
    session = open_session(argv)
    true, finished = session.run.engine.train_step, []

    def train_step(*args: object, **kwargs: object) -> StepResult:
        number = len(finished) + 1
        if number == step and isinstance(by, Path):
            by.touch()
        elif number == step and by == rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        finished.append(true(*args, **kwargs))  # type: ignore[arg-type]
        return finished[-1]

    session.run.engine.train_step = train_step  # type: ignore[method-assign]
    code = session.train()
    return code, session.progress.iteration, len(finished) == session.progress.iteration, digests(session)


@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_on_any_rank_ends_all_with_the_code_that_requeues(who: int, text: Text, tmp_path: Path) -> None:
    whole = run_ranks(asked_in, 2, text.command(), 0, by=99)
    argv = text.command(f"--save {tmp_path} --load {tmp_path} {HANDLED}")
    ended = run_ranks(asked_in, 2, argv, 3, by=who)
    assert [one[:3] for one in ended] == [(75, 3, True)] * 2
    assert open_checkpoint(tmp_path).iteration == 3
    resumed = run_ranks(asked_in, 2, argv, 0, by=99)
    assert [one[:2] for one in resumed] == [(0, 7)] * 2
    assert [one[3] for one in resumed] == [one[3] for one in whole], "bit for bit"


def test_the_code_is_the_one_asked_for_and_a_run_at_its_end_is_not_requeued(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"--train-iters 2 --lr-warmup-iters 1 --save {tmp_path} {HANDLED} --requeue-exit-code 99")
    assert run_ranks(asked_in, 1, argv, 1, by=0)[0][:2] == (99, 1)
    assert run_ranks(asked_in, 1, argv, 2, by=0)[0][:2] == (0, 2)


def test_without_the_handler_a_signal_is_what_it_always_was(text: Text) -> None:
    with pytest.raises(RuntimeError, match="died without a word of SIGUSR1"):
        run_ranks(asked_in, 1, text.command(), 1, by=0)


def test_a_stop_file_saves_and_ends_as_a_finished_run_does(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"--save {tmp_path}")
    ended = run_ranks(asked_in, 2, argv, 4, by=tmp_path / STOP_FILE)
    assert [one[:2] for one in ended] == [(0, 4)] * 2
    assert open_checkpoint(tmp_path).iteration == 4
    assert not (tmp_path / STOP_FILE).exists()
    assert [line["step"] for line in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_save_file_saves_and_the_run_goes_on(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"--save {tmp_path}")
    ended = run_ranks(asked_in, 2, argv, 4, by=tmp_path / SAVE_FILE)
    assert [one[:2] for one in ended] == [(0, 7)] * 2
    assert {path.name for path in tmp_path.glob("iter_*")} == {"iter_0000004", "iter_0000007"}
    assert not (tmp_path / SAVE_FILE).exists()


def test_a_run_that_is_asked_says_so(text: Text, tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    ended = start(text.command(f"--save {tmp_path}"), ranks=2)
    assert ended.codes == [0, 0]
    assert ended.out.count("asked to stop by file: saving and ending") == 1
    assert "step      1 | saved to" in ended.out
