"""A run that was stopped and goes on equals the uninterrupted one, in its own layout bit for bit."""

from pathlib import Path

import pytest
from torch.testing import assert_close

from megatron_sat import pretrain
from megatron_sat.training.visits import load_visits
from tests.helpers import program
from tests.helpers.command_line import PAPER
from tests.helpers.program import Text, Trained, read_records, start, trained
from tests.helpers.ranks import run_ranks
from tests.helpers.slow import mostly_slow
from tests.helpers.tolerances import RUN_LOSS, RUN_NORM

STEPS = 8
METHOD = f"--sat-schedule ladder --sat-omission-rate 0.5 --sat-schedule-start 7 --sat-rungs 2 {PAPER}"
RUN = f"{METHOD} --sat-selection-groups 2 --sat-selection-interval 3 --train-iters {STEPS} --eval-interval 4"
"""A rung to step 7; choices for steps 1-3, 4-6 and 7."""
STOPS = (6, 4)
"""Before a new choice, of which lagged statistics are known already; and between two steps of one choice."""
TP = "--tensor-model-parallel-size 2"
OVERLAPPED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


class Saved:
    """A run that left a checkpoint after every second step."""

    def __init__(self, text: Text, folder: Path, flags: str, *, ranks: int = 1) -> None:
        self.text, self.folder, self.jsonl = text, folder, folder / "metrics.jsonl"
        self.whole = self._trained(f"{flags} --save-interval 2", ranks=ranks)

    def resume(self, step: int, flags: str, *, ranks: int = 1) -> Trained:
        """Go on from the checkpoint of ``step``, as if the run had died before the next one."""
        return self._trained(f"{flags} --load {self.folder} --ckpt-step {step}", ranks=ranks)

    def _trained(self, flags: str, *, ranks: int) -> Trained:
        return trained(self.text.command(f"{RUN} --save {self.folder} {flags}"), self.jsonl, ranks=ranks)


SAME = {
    "fresh": (1, ""),
    "lagged": (1, "--sat-statistics lagged"),
    "contribution, lagged, frozen": (
        1,
        "--sat-importance contribution --sat-statistics lagged --sat-omitted-neurons frozen",
    ),
    "tp 2, lagged": (2, f"{TP} --sequence-parallel --sat-statistics lagged"),
    "dp 2, distributed optimizer": (2, f"{OVERLAPPED} --sat-statistics lagged --sat-omitted-neurons frozen"),
    "pp 2, with dropout": (2, "--pipeline-model-parallel-size 2 --hidden-dropout 0.1 --attention-dropout 0.1"),
}


@pytest.mark.parametrize("case", mostly_slow(SAME, fast=SAME.keys() - {"tp 2, lagged"}))
def test_a_run_resumed_inside_a_rung_equals_the_uninterrupted_one_bit_for_bit(
    case: str, text: Text, tmp_path: Path
) -> None:
    ranks, flags = SAME[case]
    saved = Saved(text, tmp_path, flags, ranks=ranks)
    before = read_records(saved.jsonl)
    for stop in STOPS:
        assert saved.resume(stop, flags, ranks=ranks) == saved.whole
        lines = read_records(saved.jsonl)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "no step twice, none missing"
        for key in ("consumed_tokens", "executed_flops", "learning_rate", "omission_rate"):
            assert [line[key] for line in lines] == [line[key] for line in before]
        times = [line["elapsed_seconds"] for line in lines]
        assert times == sorted(times)
        assert [line["step"] for line in read_records(saved.jsonl, kind="validation")] == [4, 8]
        visits = load_visits(tmp_path / "visits.npz")
        assert visits.steps == STEPS
        assert {name: row.tolist() for name, row in visits.counts.items()} == saved.whole.visits


def test_saving_on_the_way_does_not_change_the_run(text: Text, tmp_path: Path) -> None:
    saved = Saved(text, tmp_path, f"{OVERLAPPED} --sat-statistics lagged", ranks=2)
    argv = text.command(f"{RUN} {OVERLAPPED} --sat-statistics lagged")
    assert trained(argv, tmp_path / "unsaved.jsonl", ranks=2) == saved.whole


def without_choices(rank: int, argv: list[str]) -> None:
    """Resume, and forget what the checkpoint says of the choices."""
    pretrain.restore_choices = lambda selectors, *, saved, layout: None
    program._train(rank, argv)


def test_a_resumed_run_that_forgot_its_choice_is_told_apart(text: Text, tmp_path: Path) -> None:
    saved = Saved(text, tmp_path, "")
    argv = text.command(f"{RUN} --save {tmp_path} --load {tmp_path} --ckpt-step 4 --log-jsonl {saved.jsonl}")
    run_ranks(without_choices, 1, argv)
    losses = [line["loss"] for line in read_records(saved.jsonl)]
    assert losses[:4] == saved.whole.losses[:4]
    assert losses[4] != saved.whole.losses[4]


WIDE = "--micro-batch-size 4"
MOVES = {
    "tp 2 to 1": ((2, TP), (1, "")),
    "tp 1 to 2": ((1, ""), (2, f"{TP} --sequence-parallel")),
    "one replica to two": ((1, WIDE), (2, "--micro-batch-size 2")),
    "two replicas to one": ((2, OVERLAPPED), (1, f"{WIDE} --use-distributed-optimizer")),
    "one stage to two": ((1, ""), (2, "--pipeline-model-parallel-size 2")),
}


@pytest.mark.parametrize("move", mostly_slow(MOVES, fast=MOVES.keys() - {"tp 1 to 2", "two replicas to one"}))
def test_a_run_resumed_in_another_layout_equals_the_uninterrupted_one(move: str, text: Text, tmp_path: Path) -> None:
    """With selection groups: the same neurons, and losses but for the order of sums."""
    (ranks, flags), (new_ranks, new_flags) = MOVES[move]
    lagged = "--sat-statistics lagged"
    saved = Saved(text, tmp_path, f"{lagged} {flags}", ranks=ranks)
    for stop in STOPS:
        resumed = saved.resume(stop, f"{lagged} {new_flags}", ranks=new_ranks)
        assert resumed.visits == saved.whole.visits
        assert_close(resumed.losses, saved.whole.losses, **RUN_LOSS)
        assert_close(resumed.norms, saved.whole.norms, **RUN_NORM)
        assert_close(resumed.validation, saved.whole.validation, **RUN_LOSS)


def test_finetuning_starts_a_new_run_from_the_weights_alone(text: Text, tmp_path: Path) -> None:
    saved = Saved(text, tmp_path / "old", "")
    new = tmp_path / "new"
    argv = text.command(f"{RUN} --load {tmp_path / 'old'} --finetune --save {new} --lr 5e-4 --sat-gqa head")
    run = trained(argv, new / "metrics.jsonl")
    lines = read_records(new / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert (lines[0]["consumed_tokens"], lines[0]["learning_rate"]) == (8 * 32, 5e-4)
    assert load_visits(new / "visits.npz").steps == STEPS
    assert run.losses[0] != saved.whole.losses[0]
    assert read_records(saved.jsonl)[-1]["step"] == STEPS, "the old run's figures stay"


def test_without_the_optimizer_a_resumed_run_goes_on_from_its_step_with_fresh_moments(
    text: Text, tmp_path: Path
) -> None:
    saved = Saved(text, tmp_path, "")
    fresh = saved.resume(4, "--no-load-optim")
    assert [line["step"] for line in read_records(saved.jsonl)] == list(range(1, STEPS + 1))
    assert fresh.losses[:5] == saved.whole.losses[:5], "step 5 reads the same weights and samples"
    assert fresh.losses[5:] != saved.whole.losses[5:]


def test_a_run_stops_at_its_exit_interval_and_goes_on_to_its_end(text: Text, tmp_path: Path) -> None:
    whole = trained(text.command(RUN), tmp_path / "whole.jsonl")
    argv = text.command(f"{RUN} --save {tmp_path} --load {tmp_path}")
    for end in (3, 6, 8):
        ended = start([*argv, "--exit-interval", "3"])
        assert ended.codes == [0], ended.err
        assert read_records(tmp_path / "metrics.jsonl")[-1]["step"] == end
    assert [line["loss"] for line in read_records(tmp_path / "metrics.jsonl")] == whole.losses


def test_a_finished_run_started_again_is_evaluated_and_trains_no_further(text: Text, tmp_path: Path) -> None:
    argv = text.command(f"{RUN} --save {tmp_path} --load {tmp_path}")
    assert start(argv).codes == [0]
    before = read_records(tmp_path / "metrics.jsonl", kind="validation")[-1]
    again = start(argv)
    assert again.codes == [0], again.err
    assert len(read_records(tmp_path / "metrics.jsonl")) == STEPS
    assert read_records(tmp_path / "metrics.jsonl", kind="validation")[-1]["loss"] == before["loss"]
