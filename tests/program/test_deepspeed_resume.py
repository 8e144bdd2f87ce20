"""Checkpoints of DeepSpeed: resumed bit for bit, in other stages and layouts too, open to Megatron and to export."""

from pathlib import Path

import pytest
from torch.testing import assert_close

from tests.helpers.program import Text, read_records, start, trained
from tests.helpers.slow import mostly_slow
from tests.helpers.tolerances import RUN_LOSS, RUN_NORM
from tests.helpers.zero_engine import load_library, needs_deepspeed
from tests.program.test_deepspeed import SHARDED
from tests.program.test_resume import RUN, TP, WIDE, Saved

pytestmark = needs_deepspeed


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    load_library()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """DeepSpeed, with nothing kept whole at stage 3."""
    file = tmp_path_factory.mktemp("deepspeed") / "sharded.json"
    file.write_text(SHARDED)
    return f"--engine deepspeed --deepspeed-config {file}"


SAME = {
    "zero 0": (1, "--zero-stage 0"),
    "zero 1, dp 2": (2, "--zero-stage 1 --sat-statistics lagged"),
    "zero 2, dp 2, frozen": (2, "--zero-stage 2 --sat-omitted-neurons frozen"),
    "zero 3, dp 2": (2, "--zero-stage 3 --sat-statistics lagged"),
    "zero 2, dp 2, written in the background": (2, "--zero-stage 2 --async-save"),
    "zero 3, dp 2, written in the background": (2, "--zero-stage 3 --async-save"),
    "zero 1, dp 2, bf16": (2, "--zero-stage 1 --bf16"),
    "zero 2, dp 2, bf16": (2, "--zero-stage 2 --bf16"),
    "zero 3, dp 2, bf16": (2, "--zero-stage 3 --bf16"),
    "zero 3, tp 2, dp 2": (4, f"--zero-stage 3 {TP} --sequence-parallel"),
}


@pytest.mark.parametrize("case", mostly_slow(SAME, fast=("zero 1, dp 2", "zero 3, dp 2")))
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    case: str, text: Text, sharded: str, tmp_path: Path
) -> None:
    ranks, flags = SAME[case]
    saved = Saved(text, tmp_path, f"{flags} {sharded}", ranks=ranks)
    for stop in (6, 4):
        assert saved.resume(stop, f"{flags} {sharded}", ranks=ranks) == saved.whole


@pytest.mark.slow
def test_a_resumed_run_without_its_moments_is_told_apart(text: Text, sharded: str, tmp_path: Path) -> None:
    saved = Saved(text, tmp_path, f"--zero-stage 2 {sharded}", ranks=2)
    fresh = saved.resume(4, f"--zero-stage 2 {sharded} --no-load-optim", ranks=2)
    assert fresh.losses[:5] == saved.whole.losses[:5], "step 5 reads the same weights and samples"
    assert fresh.losses[5:] != saved.whole.losses[5:]


MOVES = {
    "two replicas to one": ((2, "--zero-stage 1 --micro-batch-size 2"), (1, f"--zero-stage 1 {WIDE}")),
    "one replica to two, zero 1 to 3": ((1, f"--zero-stage 1 {WIDE}"), (2, "--zero-stage 3 --micro-batch-size 2")),
    "zero 3 to 2": ((2, "--zero-stage 3"), (2, "--zero-stage 2")),
    "zero 2 to 0": ((2, "--zero-stage 2"), (2, "--zero-stage 0")),
    "tp 2 to 1": ((2, f"--zero-stage 1 {TP}"), (1, "--zero-stage 1")),
    "tp 1 to 2, zero 3": ((2, f"--zero-stage 3 {WIDE}"), (4, f"--zero-stage 3 {TP} {WIDE}")),
}


@pytest.mark.parametrize("move", mostly_slow(MOVES, fast=("one replica to two, zero 1 to 3",)))
def test_a_run_goes_on_in_another_stage_or_layout(move: str, text: Text, sharded: str, tmp_path: Path) -> None:
    (ranks, flags), (other_ranks, other_flags) = MOVES[move]
    saved = Saved(text, tmp_path, f"{flags} {sharded}", ranks=ranks)
    resumed = saved.resume(4, f"{other_flags} {sharded}", ranks=other_ranks)
    assert resumed.losses[:4] == saved.whole.losses[:4]
    assert_close(resumed.losses, saved.whole.losses, **RUN_LOSS)
    assert_close(resumed.norms, saved.whole.norms, **RUN_NORM)
    assert_close(resumed.validation, saved.whole.validation, **RUN_LOSS)


@pytest.mark.parametrize("precision", mostly_slow(("", "--bf16"), fast=("",)))
def test_a_checkpoint_opens_on_megatrons_engine_with_the_same_weights(
    precision: str, text: Text, sharded: str, tmp_path: Path
) -> None:
    saved = Saved(text, tmp_path / "old", f"--zero-stage 3 {sharded} {precision}", ranks=2)
    last = saved.whole.validation[-1]
    argv = text.command(f"{RUN} {precision} --load {tmp_path / 'old'} --no-load-optim --no-load-rng")
    again = trained(argv, tmp_path / "again.jsonl")
    assert_close(again.validation[-1], last, **RUN_LOSS)


def test_an_optimizer_of_another_engine_is_refused(text: Text, sharded: str, tmp_path: Path) -> None:
    on_megatron, on_deepspeed = tmp_path / "megatron", tmp_path / "deepspeed"
    assert start(text.command(f"{RUN} --exit-interval 2 --save {on_megatron}")).codes == [0]
    assert start(text.command(f"{RUN} --exit-interval 2 --save {on_deepspeed} {sharded}")).codes == [0]
    ended = start(text.command(f"{RUN} --load {on_megatron} {sharded}"))
    assert "optimizer state must be DeepSpeed's, the checkpoint's is megatron.core's; leave --engine" in ended.err
    ended = start(text.command(f"{RUN} --load {on_deepspeed}"))
    assert "must be of this run's kind (fp32), the checkpoint's is DeepSpeed's; set --engine, precision" in ended.err
    ended = start(text.command(f"{RUN} --load {on_deepspeed} {sharded} --bf16"))
    assert "weights must be fp32 as in the checkpoint, they are not; change --bf16, or pass" in ended.err
    fresh = start(text.command(f"{RUN} --load {on_deepspeed} --no-load-optim --log-jsonl {tmp_path / 'fresh.jsonl'}"))
    assert fresh.codes == [0], fresh.err
    assert [line["step"] for line in read_records(tmp_path / "fresh.jsonl")] == list(range(3, 9))
