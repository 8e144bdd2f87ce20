"""State in the host's memory, updated by what DeepSpeed compiles for it: the same run, and resumed bit for bit."""

import json
from pathlib import Path

import pytest
from torch.testing import assert_close

from megatron_sat.engines import zero_adam
from megatron_sat.engines.deepspeed import library
from tests.helpers.program import SPARSE, Text, Trained, start, trained
from tests.helpers.tolerances import RUN_LOSS_BF16
from tests.helpers.zero_engine import load_library, needs_deepspeed
from tests.program.test_layouts import WIDE, assert_same_run
from tests.program.test_resume import Saved

pytestmark = [needs_deepspeed, pytest.mark.slow, pytest.mark.timeout(900)]

ON_HOST = {"offload_optimizer": {"device": "cpu"}}
FILES = {
    "zero 1": (1, ON_HOST),
    "zero 2": (2, ON_HOST),
    "zero 3": (3, ON_HOST | {"stage3_param_persistence_threshold": 0}),
    "zero 3, everything": (3, ON_HOST | {"offload_param": {"device": "cpu"}}),
}


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Minutes, once for the machine; ranks that are forked from here have it."""
    load_library()
    builder = library().ops.op_builder.CPUAdamBuilder()
    reason = zero_adam._why_not(library(), builder) or zero_adam._load(builder)
    if reason is not None:
        pytest.skip(f"DeepSpeed's Adam for the host: {reason}")


def on_host(folder: Path, case: str) -> str:
    stage, zero = FILES[case]
    file = folder / f"{case.replace(' ', '_')}.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    return f"--engine deepspeed --zero-stage {stage} --deepspeed-config {file}"


def run(text: Text, folder: Path, flags: str, *, ranks: int) -> Trained:
    return trained(text.command(flags), folder / f"{len(list(folder.iterdir()))}.jsonl", ranks=ranks)


@pytest.mark.parametrize("case", FILES)
def test_it_trains_as_megatrons_engine_does(case: str, text: Text, tmp_path: Path) -> None:
    theirs = run(text, tmp_path, f"{SPARSE} {on_host(tmp_path, case)}", ranks=2)
    assert_same_run(theirs, run(text, tmp_path, f"{SPARSE} {WIDE}", ranks=1))


@pytest.mark.parametrize("case", ["zero 2", "zero 3"])
def test_what_is_frozen_stays(case: str, text: Text, tmp_path: Path) -> None:
    flags = f"{SPARSE} --sat-omitted-neurons frozen"
    theirs = run(text, tmp_path, f"{flags} {on_host(tmp_path, case)}", ranks=2)
    assert_same_run(theirs, run(text, tmp_path, f"{flags} {WIDE}", ranks=1))


def test_in_bf16_it_is_near_torchs(text: Text, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = f"{SPARSE} --bf16 {on_host(tmp_path, 'zero 2')}"
    theirs = run(text, tmp_path, flags, ranks=2)
    monkeypatch.setattr(zero_adam, "_compiled_everywhere", lambda _: "not wanted")
    torchs = run(text, tmp_path, flags, ranks=2)
    assert_close(theirs.losses, torchs.losses, **RUN_LOSS_BF16)


@pytest.mark.parametrize("case", ["zero 2", "zero 3"])
@pytest.mark.parametrize("more", ["", "--bf16", "--async-save"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    case: str, more: str, text: Text, tmp_path: Path
) -> None:
    flags = f"{more} {on_host(tmp_path, case)}"
    saved = Saved(text, tmp_path, flags, ranks=2)
    for stop in (6, 4):
        assert saved.resume(stop, flags, ranks=2) == saved.whole


def test_the_run_says_which_it_is(text: Text, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = text.command(f"{on_host(tmp_path, 'zero 2')} --train-iters 1 --lr-warmup-iters 0")
    assert "DeepSpeed's AdamW for the host in DeepSpeed" in start(argv, ranks=2).out
    monkeypatch.setattr(zero_adam.shutil, "which", lambda _: None)
    assert "torch's AdamW (DeepSpeed's for the host: no compiler, " in start(argv, ranks=2).out
