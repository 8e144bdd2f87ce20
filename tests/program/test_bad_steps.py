"""Injected faults: a step that cannot be trusted is found, named, and passed over, taken back, or the run's end."""

import math
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat import log
from megatron_sat.checkpoint.resume import open_checkpoint
from megatron_sat.engines.base import Batch, forward_tokens
from megatron_sat.pretrain import Session
from megatron_sat.training import guard
from tests.helpers.command_line import PAPER
from tests.helpers.program import Text, digests, open_session, read_records, start
from tests.helpers.ranks import run_ranks

BAD = 4
"""The step that goes wrong."""
Fault = Callable[[Tensor], Tensor]
"""Spoils the losses of one micro-batch, [b, s]; and with them its gradient."""


def nan(losses: Tensor) -> Tensor:
    return losses * math.nan


def leap(losses: Tensor) -> Tensor:
    return losses * 100


def steep(losses: Tensor) -> Tensor:
    """The loss stays, its gradient is a thousand times what it was."""
    losses.register_hook(lambda gradient: gradient * 1000)
    return losses


def broken(losses: Tensor) -> Tensor:
    """The loss stays, its gradient is no number."""
    losses.register_hook(lambda gradient: gradient * math.nan)
    return losses


def spoil(session: Session, fault: Fault, *, steps: Collection[int], rank: int) -> None:
    """Let the second micro-batch of these steps go wrong on one rank."""
    engine, done = session.run.engine, session.progress.iteration
    true = engine.train_step

    def train_step(micro_batches: Iterator[Batch], *, num_micro_batches: int) -> Any:
        nonlocal done
        done += 1
        seen = 0

        def forward(model: torch.nn.Module, batch: Batch) -> Tensor:
            nonlocal seen
            seen += 1
            losses = forward_tokens(model, batch)
            bad = done in steps and seen == 2 and torch.distributed.get_rank() == rank
            return fault(losses) if bad else losses

        return true(micro_batches, num_micro_batches=num_micro_batches, forward=forward)

    engine.train_step = train_step  # type: ignore[method-assign, assignment]


def run_spoilt(
    _: int, argv: list[str], fault: Fault, *, steps: Collection[int] = (BAD,), rank: int = 1
) -> tuple[int | str, dict[str, str], int]:
    """Exit code or last word, weights, and the number of bad steps of a run with a fault."""
    guard.ENOUGH = 2
    session = open_session(argv)
    spoil(session, fault, steps=steps, rank=rank)
    try:
        code: int | str = session.train()
    except RuntimeError as error:
        code = str(error)
    return code, digests(session), session.guard.bad_steps


def without_update(_: int, argv: list[str], steps: set[int]) -> dict[str, str]:
    """The slow obvious twin of skipping: in these steps nothing is updated, by hand."""
    session = open_session(argv)
    engine, done = session.run.engine, 0
    optimizer: Any = engine._optimizer
    update = optimizer.step_with_ready_grads

    def only_in_others() -> bool:
        nonlocal done
        done += 1
        return False if done in steps else update()

    optimizer.step_with_ready_grads = only_in_others
    session.train()
    return digests(session)


LEAPS = "--max-loss-leap 3 --max-norm-leap 50"
FAULTS: dict[str, tuple[Fault, str]] = {
    "a loss that is no number": (nan, "the loss is nan"),
    "a gradient that is no number": (broken, "the gradient's norm is not a number, at a loss of"),
    "a loss that leaps": (leap, "times the recent median"),
    "a gradient that explodes": (steep, "the gradient's norm is above 50.0 times the recent median"),
}
LAYOUTS = {
    "dp 2": "",
    "dp 2, distributed optimizer": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "tp 2, bf16": "--tensor-model-parallel-size 2 --sequence-parallel --bf16",
    "pp 2": "--pipeline-model-parallel-size 2",
}


def layouts(*fast: str) -> list[Any]:
    """All of them, those that are not named only among the slow tests."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in LAYOUTS]


@pytest.fixture(scope="module")
def before(text: Text) -> list[dict[str, str]]:
    """The weights of each rank before the bad step."""
    return [one[1] for one in run_ranks(run_spoilt, 2, text.command(f"--exit-interval {BAD - 1}"), nan, steps=())]


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_ends_the_run_before_it_touches_anything_and_is_named(
    case: str, before: list[dict[str, str]], text: Text, tmp_path: Path
) -> None:
    """By step, rank, micro-batch and documents; the checkpoints are those from before."""
    fault, said = FAULTS[case]
    argv = text.command(f"{LEAPS} --save {tmp_path} --save-interval 2")
    ended = run_ranks(run_spoilt, 2, argv, fault)
    for word, _, count in ended:
        assert isinstance(word, str)
        assert word.startswith(f"step {BAD}: ") and said in word
        assert "The run ends and saves nothing: resume from the last checkpoint" in word
        assert count == 1
        if fault in (nan, leap):
            assert "highest on rank 1, micro-batch 2, loss" in word
            assert "(documents of sample 30: " in word and "; sample 31: " in word
            assert any(f"{name} " in word for name in ("poetry", "en"))
    assert open_checkpoint(tmp_path).iteration == 2
    assert [weights for _, weights, _ in ended] == before


def test_the_program_says_it_in_one_line_and_ends_with_its_code(text: Text) -> None:
    """Here a learning rate that no model survives."""
    ended = start(text.command("--lr 1e30 --min-lr 1e30 --lr-warmup-iters 0 --lr-warmup-init 0"), ranks=2)
    assert ended.codes == [3, 3]
    (line,) = ended.err.splitlines()
    assert line.startswith("error: step 2: the gradient's norm is not a number")
    assert "highest on rank" in line


@pytest.mark.parametrize("layout", layouts("dp 2, distributed optimizer"))
def test_a_skipped_step_leaves_all_as_it_was_and_the_data_go_on(layout: str, text: Text, tmp_path: Path) -> None:
    """Bit for bit what a run computes in which that update is left out by hand."""
    argv = text.command(f"{LAYOUTS[layout]} --on-bad-step skip --log-jsonl {tmp_path / 'metrics.jsonl'}")
    rank = 1 if layout != "tp 2, bf16" else 0
    ended = run_ranks(run_spoilt, 2, argv, nan, rank=rank)
    assert [(code, count) for code, _, count in ended] == [(0, 1)] * 2
    lines = read_records(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [int(step == BAD) for step in range(1, 8)]
    assert [line["consumed_tokens"] for line in lines] == [8 * 32 * step for step in range(1, 8)]
    rates = [line["learning_rate"] for line in lines]
    assert rates[BAD] == rates[BAD - 1], "the schedule did not advance"
    assert [weights for _, weights, _ in ended] == run_ranks(without_update, 2, argv, {BAD})


@pytest.mark.parametrize("method", ["--sat-statistics lagged", "--sat-selection-interval 3"])
def test_a_skipped_step_leaves_no_choice_behind(method: str, text: Text, tmp_path: Path) -> None:
    """Sums and choices of a step whose tokens went wrong would be the next ones'."""
    sparse = f"--sat-schedule constant --sat-omission-rate 0.5 {PAPER} {method} --train-iters 6"
    argv = text.command(f"{sparse} --on-bad-step skip --log-jsonl {tmp_path / 'metrics.jsonl'}")
    run_ranks(run_spoilt, 1, argv, nan, rank=0)
    good = [line["loss"] for line in read_records(tmp_path / "metrics.jsonl") if line["step"] != BAD]
    assert len(good) == 5 and all(math.isfinite(loss) for loss in good)


def test_skipping_is_told_apart_from_training(text: Text) -> None:
    argv = text.command("--on-bad-step skip")
    (skipped,), (trained,) = (run_ranks(run_spoilt, 1, argv, nan, rank=who) for who in (0, 9))
    assert (skipped[2], trained[2]) == (1, 0)
    assert skipped[1] != trained[1]


def test_a_run_stops_past_its_limit_of_bad_steps(text: Text) -> None:
    argv = text.command("--on-bad-step skip --max-bad-steps 1")
    ((word, _, count),) = run_ranks(run_spoilt, 1, argv, nan, steps={3, 4, 5}, rank=0)
    assert count == 2
    assert "step 4: " in str(word) and "That is bad step 2, --max-bad-steps is 1: the run ends" in str(word)


def test_the_count_goes_through_a_checkpoint(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"--on-bad-step skip --max-bad-steps 1 --save {tmp_path} --load {tmp_path}")
    assert run_ranks(run_spoilt, 1, [*argv, "--exit-interval", "4"], nan, steps={2}, rank=0)[0][0] == 0
    ((word, _, count),) = run_ranks(run_spoilt, 1, argv, nan, steps={6}, rank=0)
    assert (count, "That is bad step 2" in str(word)) == (2, True)


@pytest.mark.parametrize("layout", layouts("dp 2"))
def test_a_rollback_goes_back_to_the_last_checkpoint_and_on_behind_the_bad_step(
    layout: str, text: Text, tmp_path: Path
) -> None:
    """Bit for bit a run whose updates since the checkpoint were left out by hand; and a resume knows nothing of it."""
    flags = f"{LAYOUTS[layout]} --hidden-dropout 0.1 --on-bad-step rollback --save-interval 2"
    rank = 1 if layout != "tp 2, bf16" else 0
    argv = text.command(f"{flags} --save {tmp_path} --load {tmp_path}")
    ended = run_ranks(run_spoilt, 2, argv, nan, rank=rank, steps={BAD + 1})
    assert [(code, count) for code, _, count in ended] == [(0, 1)] * 2
    assert [line["step"] for line in read_records(tmp_path / "metrics.jsonl")] == list(range(1, 8))
    again = run_ranks(run_spoilt, 2, [*argv, "--ckpt-step", "6"], nan, steps=())
    assert [one[1] for one in again] == [one[1] for one in ended]


def test_a_rollback_undoes_every_update_since_the_checkpoint(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"--on-bad-step rollback --save-interval 3 --save {tmp_path}")
    ((code, weights, _),) = run_ranks(run_spoilt, 1, argv, nan, rank=0, steps={5})
    assert code == 0
    assert [weights] == run_ranks(without_update, 1, text.command(), {4, 5})
    assert [weights] != run_ranks(without_update, 1, text.command(), {5}), "not the same as skipping"


def test_there_is_no_rollback_before_the_first_checkpoint(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"--on-bad-step rollback --save-interval 6 --save {tmp_path}")
    ((word, *_),) = run_ranks(run_spoilt, 1, argv, nan, rank=0)
    assert "There is no checkpoint yet to roll back to; lower --save-interval" in str(word)


def test_a_run_says_what_it_skipped_and_what_it_rolled_back(text: Text, tmp_path: Path) -> None:
    for policy, said in (
        ("skip", "The step is skipped; nothing was updated"),
        ("rollback", "Rolled back: weights and moments are those of step 2, the data go on behind this step"),
    ):
        argv = text.command(f"--on-bad-step {policy} --save {tmp_path / policy} --save-interval 2")
        (said_all,) = run_ranks(partial(_said, fault=nan), 1, argv)
        assert said_all.count(said) == 1


def _said(rank: int, argv: list[str], *, fault: Fault) -> str:
    said: list[str] = []
    log.say = said.append  # type: ignore[assignment]
    run_spoilt(rank, argv, fault, rank=0)
    return "\n".join(said)


def test_a_checkpoint_after_a_bad_step_drops_no_older_one(text: Text, tmp_path: Path) -> None:
    """No good step has shown yet that its weights are sound."""
    argv = text.command(f"--on-bad-step skip --save {tmp_path} --save-interval 2 --save-keep-last 1")
    assert run_ranks(run_spoilt, 1, [*argv, "--exit-interval", "4"], nan, rank=0)[0][0] == 0
    assert {path.name for path in tmp_path.glob("iter_*")} == {"iter_0000002", "iter_0000004"}
