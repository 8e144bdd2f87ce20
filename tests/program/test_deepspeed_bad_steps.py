"""A step that cannot be trusted, on DeepSpeed: found before the update at every stage, passed over as on Megatron."""

import math
from pathlib import Path

import pytest
from torch.testing import assert_close

from tests.helpers.program import Text, read_records
from tests.helpers.ranks import run_ranks
from tests.helpers.slow import mostly_slow
from tests.helpers.tolerances import RUN_LOSS
from tests.helpers.zero_engine import load_library, needs_deepspeed
from tests.program.test_bad_steps import BAD, FAULTS, LEAPS, nan, run_spoilt

pytestmark = needs_deepspeed
STAGES = ("--zero-stage 0", "--zero-stage 1", "--zero-stage 2", "--zero-stage 3", "--zero-stage 1 --bf16")
STAGES = (*STAGES, "--zero-stage 2 --bf16", "--zero-stage 3 --bf16")


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    load_library()


@pytest.mark.slow
@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_ends_the_run_before_it_touches_anything_and_is_named(stage: str, case: str, text: Text) -> None:
    fault, said = FAULTS[case]
    ended = run_ranks(run_spoilt, 2, text.command(f"{LEAPS} --engine deepspeed {stage}"), fault)
    for word, _, count in ended:
        assert isinstance(word, str)
        assert word.startswith(f"step {BAD}: ") and said in word
        assert ("highest on rank 1, micro-batch 2" in word) or "gradient" in word
        assert count == 1
    before = text.command(f"--exit-interval {BAD - 1} --engine deepspeed {stage}")
    assert [one[1] for one in ended] == [one[1] for one in run_ranks(run_spoilt, 2, before, nan, steps=())]


@pytest.mark.parametrize("stage", mostly_slow(STAGES[:4], fast=("--zero-stage 2",)))
def test_a_skipped_step_is_passed_over_as_on_megatrons_engine(stage: str, text: Text, tmp_path: Path) -> None:
    skip = f"{LEAPS} --on-bad-step skip --log-jsonl {tmp_path}"
    ours = run_ranks(
        run_spoilt,
        2,
        text.command(f"{skip}/ours --engine deepspeed {stage}"),
        FAULTS["a gradient that is no number"][0],
    )
    theirs = run_ranks(run_spoilt, 2, text.command(f"{skip}/theirs"), FAULTS["a gradient that is no number"][0])
    assert [(code, count) for code, _, count in ours] == [(code, count) for code, _, count in theirs] == [(0, 1)] * 2
    one, two = (read_records(tmp_path / name) for name in ("ours", "theirs"))
    assert [line["skipped_steps"] for line in one] == [int(step == BAD) for step in range(1, 8)]
    assert [line["learning_rate"] for line in one] == [line["learning_rate"] for line in two]
    whole = [(a["loss"], b["loss"]) for a, b in zip(one, two, strict=True) if not math.isnan(b["loss"])]
    assert len(whole) == 6
    assert_close([a for a, _ in whole], [b for _, b in whole], **RUN_LOSS)
