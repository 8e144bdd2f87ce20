"""What cannot be obeyed ends the program before its first step: code 2, one line that says why, nothing written."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_sat import build, pretrain
from megatron_sat.checkpoint.folder import TRACKER
from tests.helpers.command_line import PAPER
from tests.helpers.program import LADDER, Text, start
from tests.helpers.ranks import run_ranks

SHORT = "--train-iters 2 --lr-warmup-iters 0"
INTERLEAVED = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"

COMMAND_LINE = {
    "rate 1": (f"{LADDER} --sat-omission-rate 1.0", "--sat-omission-rate must be in [0, 1), got 1"),
    "rate below 0": (f"{LADDER} --sat-omission-rate -0.1", "--sat-omission-rate must be in [0, 1), got -0.1"),
    "eta after the end": (
        f"{LADDER} --sat-schedule-start 8",
        "--sat-schedule-start must be between 0 and --train-iters (7), got 8",
    ),
    "no rungs": (f"{LADDER} --sat-rungs 0", "--sat-rungs must be at least 1, got 0"),
    "tp": (
        f"{LADDER} --tensor-model-parallel-size 2 --num-query-groups 1",
        "--tensor-model-parallel-size (2) must divide --num-query-groups (1)",
    ),
    "too few ranks": ("--tensor-model-parallel-size 4", "the number of ranks (2) must be a multiple of"),
    "metric": (f"{LADDER} --sat-importance maxipp", "--sat-importance must be one of uniform, magnitude"),
    "temperature": (f"{LADDER} --sat-temperature 0", "--sat-temperature must be above 0, got 0.0"),
    "contradiction": (
        f"{LADDER} --sat-importance uniform --sat-selection top-k",
        "--sat-selection top-k needs scores that differ, got --sat-importance uniform",
    ),
    "no effect": ("--sat-importance maxip", "--sat-importance has no effect with --sat-schedule none"),
    "unknown": ("--sat-omision-rate 0.5", "--sat-omision-rate is unknown; the nearest known is --sat-omission-rate"),
    "interleaved": (
        f"{INTERLEAVED} --micro-batch-size 8",
        "an interleaved pipeline of 2 ranks passes on 2 micro-batches at a time, got 1",
    ),
}


@pytest.mark.parametrize("case", COMMAND_LINE)
def test_a_command_line_that_cannot_be_obeyed_is_refused_in_one_line(case: str, text: Text, tmp_path: Path) -> None:
    more, said = COMMAND_LINE[case]
    assert_refused(text.command(more), said, tmp_path / "save")


def assert_refused(argv: list[str], said: str, save: Path, *, lines: int = 1) -> None:
    """On two ranks: code 2 on both, one message from one of them, and no folder."""
    ended = start([*argv, "--save", str(save)], ranks=2)
    assert ended.codes == [2, 2]
    assert ended.err.startswith("error: ")
    assert said in ended.err
    assert len(ended.err.splitlines()) == lines
    assert "Traceback" not in ended.out + ended.err
    assert not save.exists()


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no .idx": (lambda p: p.with_suffix(".idx").unlink(), "bad.idx does not exist"),
    "no .bin": (lambda p: p.with_suffix(".bin").unlink(), "its preparation was interrupted"),
    "an empty .bin": (lambda p: p.with_suffix(".bin").write_bytes(b""), "bad.idx is corrupt: it must describe bad.bin"),
    "an empty .idx": (lambda p: p.with_suffix(".idx").write_bytes(b""), "bad.idx is corrupt: it must have a header"),
    "half an .idx": (lambda p: half(p.with_suffix(".idx")), "bad.idx is corrupt: it must have 1242 bytes"),
    "another format": (
        lambda p: p.with_suffix(".idx").write_bytes(b"PARQUET" * 100),
        "bad.idx is corrupt: it must begin with",
    ),
    "half a .bin": (lambda p: half(p.with_suffix(".bin")), "bad.idx is corrupt: it must describe bad.bin to its end"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_data_are_refused_by_name(case: str, text: Text, tmp_path: Path) -> None:
    damage, said = DAMAGE[case]
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(text.prefix("zh/poetry") + suffix, tmp_path / f"bad{suffix}")
    damage(tmp_path / "bad")
    argv = text.command(f"--train-data-path {tmp_path / 'bad'}", without="--train-data-path")
    assert_refused(argv, said, tmp_path / "save")


TEXT = {
    "no such data": ("--valid-data-path /nowhere/else", "--valid-data-path", "/nowhere/else.bin does not exist"),
    "another tokenizer": (
        "--tokenizer-type NullTokenizer --vocab-size 4096",
        "--tokenizer-type --tokenizer-model",
        "domain poetry: data and training must have one tokenizer",
    ),
    "no tokenizer": ("--tokenizer-model /nowhere", "", "tokenizer_model must be a local path, /nowhere does not exist"),
    "a small vocabulary": ("--vocab-size 100", "", "--vocab-size must be at least the tokenizer's 4096, got 100"),
    "too little text": (
        "--seq-length 9999 --max-position-embeddings 9999",
        "",
        "domain poetry: train must hold one sample of seq_length + 1 = 10000 tokens",
    ),
}


@pytest.mark.parametrize("case", TEXT)
def test_text_and_tokenizer_that_do_not_fit_are_refused(case: str, text: Text, tmp_path: Path) -> None:
    more, without, said = TEXT[case]
    assert_refused(text.command(more, without=without), said, tmp_path / "save")


def test_a_split_that_leaves_no_text_for_training_is_refused(text: Text, tmp_path: Path) -> None:
    argv = text.command(
        f"--data-path {text.prefix('zh/poetry')} --split 0,1,0", without="--train-data-path --valid-data-path"
    )
    assert_refused(argv, "got text for evaluation alone (--split 0,1,0)", tmp_path / "save")


CHECKPOINT = {
    "longer": ("--train-iters 9", "--train-iters x --global-batch-size was 16, got 72"),
    "other seed": (f"{SHORT} --seed 5", "the data of a resumed run must be as they were, --seed was 1234, got 5"),
    "other rates": (f"{SHORT} --lr 2e-3", "pass --override-opt-param-scheduler for the new schedule"),
    "other precision": (f"{SHORT} --bf16", "the optimizer state must be of this run's kind"),
}


@pytest.mark.parametrize("case", CHECKPOINT)
def test_a_checkpoint_of_another_run_is_refused(case: str, text: Text, weights: Path, tmp_path: Path) -> None:
    more, said = CHECKPOINT[case]
    assert_refused(text.command(f"{more} --load {weights}"), said, tmp_path / "save")


@pytest.mark.parametrize("finetune", ["", "--finetune"])
def test_a_checkpoint_of_another_shape_is_refused_tensor_by_tensor(
    finetune: str, text: Text, weights: Path, tmp_path: Path
) -> None:
    """Two of them: a line each, one before and one after."""
    argv = text.command(f"{SHORT} --load {weights} --ffn-hidden-size 64 {finetune}")
    said = "decoder.layers.mlp.linear_fc1.weight: [4, 128, 64] in the model, [4, 192, 64] in the checkpoint"
    assert_refused(argv, said, tmp_path / "save", lines=4)


@pytest.mark.parametrize("because", ["--exit-on-missing-checkpoint", "--finetune", "--ckpt-step 5"])
def test_a_checkpoint_that_must_be_there_and_is_not_is_refused(because: str, text: Text, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    said = f"{absent}/iter_0000005 is not there" if "step" in because else f"--load must be a folder with {TRACKER}"
    assert_refused(text.command(f"--load {absent} {because}"), said, tmp_path / "save")


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(text: Text, weights: Path, tmp_path: Path) -> None:
    argv = text.command(f"{SHORT} --load {weights} --ckpt-step 1")
    assert_refused(argv, "iter_0000001 is not there; whole ones: 2; choose with --ckpt-step", tmp_path / "save")


def test_an_empty_load_folder_is_a_fresh_start_and_says_so(text: Text, tmp_path: Path) -> None:
    ended = start(text.command(f"{SHORT} --load {tmp_path / 'absent'}"))
    assert ended.codes == [0]
    assert "holds no checkpoint: this run starts afresh" in ended.out


def test_query_groups_that_left_whole_cannot_go_on_by_the_head(text: Text, tmp_path: Path) -> None:
    sparse = f"{SHORT} --sat-schedule constant --sat-omission-rate 0.5 {PAPER}"
    assert start(text.command(f"{sparse} --save {tmp_path / 'old'}")).codes == [0]
    argv = text.command(f"{sparse} --load {tmp_path / 'old'} --sat-gqa head")
    assert_refused(argv, "resume with the model and --sat-gqa of the saved run", tmp_path / "save")


def test_what_a_run_leaves_behind_must_be_writable(text: Text, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder\n")
    for flags in (
        f"--save {file}",
        f"--save {file / 'deeper'}",
        f"--log-jsonl {tmp_path}",
        f"--tensorboard-dir {file}",
    ):
        ended = start(text.command(flags), ranks=2)
        assert ended.codes == [2, 2]
        assert ended.err.startswith("error: what a run leaves behind must be writable, ")
        assert len(ended.err.splitlines()) == 1
    assert file.read_text() == "no folder\n"


def test_a_file_that_no_run_wrote_is_not_taken_for_its_figures(text: Text, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "never to be overwritten"}\n')
    argv = text.command(f"--log-jsonl {corpus}")
    assert_refused(argv, "--log-jsonl must be new or hold an earlier run's figures", tmp_path / "save")
    assert corpus.read_text() == '{"text": "never to be overwritten"}\n'


def missed(rank: int, argv: list[str]) -> tuple[int, str]:
    """The program on the second of two hosts, where the tokenizer is missing; the first is busy with other things."""
    said: list[str] = []
    if rank == 0:
        time.sleep(3)
        code = 0
    else:
        os.environ["LOCAL_RANK"] = "0"
        pretrain.PATIENCE_SECONDS = 1.0
        build.initialize_model_parallel = lambda **_: None  # type: ignore[assignment, return-value]
        sys.stderr.write = said.append  # type: ignore[method-assign, assignment]
        code = pretrain.main(argv)
    dist.destroy_process_group()
    return code, "".join(said)


def test_what_is_wrong_on_one_host_alone_is_said_there_and_ends_that_rank(text: Text) -> None:
    """A launcher then ends the others, which could not have known."""
    argv = text.command("--tokenizer-model /not/on/this/host")
    assert run_ranks(missed, 2, argv, timeout=60)[1] == (
        2,
        "error: tokenizer_model must be a local path, /not/on/this/host does not exist; fetch it (no hub is asked)\n",
    )
