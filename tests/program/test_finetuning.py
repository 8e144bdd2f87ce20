"""Fine-tuning by the program: packed or one by one, in whatever layout, on either engine, resumed or not: one run."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.testing import assert_close

from megatron_sat import build
from megatron_sat.data.prepare import prepare_lines
from megatron_sat.data.sft_encode import ChatOptions, chat_job
from megatron_sat.data.sft_template import build_template
from megatron_sat.data.tokenizer import build_tokenizer
from megatron_sat.pretrain import main
from tests.helpers.command_line import PAPER
from tests.helpers.program import SPARSE, TOKENIZER, Text, Trained, each_once, read_records, start, trained
from tests.helpers.slow import mostly_slow
from tests.helpers.tolerances import EXACT, RUN_LOSS, RUN_NORM
from tests.helpers.zero_engine import load_library, needs_deepspeed
from tests.program.test_layouts import OURS, OVERLAPPED, PP, TP, WIDE, assert_same_run

WORDS = "call me Ishmael some years ago never mind how long having little or no money in my purse".split()
NUMBER = {"train": 70, "valid": 12}
WINDOWS = 30
"""Of an epoch of the first; the program says so, which `test_the_start_says_what_an_epoch_is` reads."""


def write_records(path: Path, *, number: int, seed: int) -> None:
    """Questions of 1 to 5 words with answers of 1 to 9."""
    draw = random.Random(seed)

    def said(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    records = [{"instruction": said(5), "output": said(9)} for _ in range(number)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data sets "train" and "valid"."""
    folder = tmp_path_factory.mktemp("instructions")
    tokenizer = build_tokenizer("SentencePieceTokenizer", model=str(TOKENIZER))
    job = chat_job(ChatOptions(), template=build_template("plain", tokenizer=tokenizer))
    for seed, (split, number) in enumerate(NUMBER.items()):
        source = folder / f"{split}.jsonl"
        write_records(source, number=number, seed=seed)
        prepare_lines([str(source)], output_prefix=str(folder / split), tokenizer=tokenizer, job=job, workers=1)
    return folder


def command(text: Text, instructions: Path, more: str = "", *, without: str = "") -> list[str]:
    """A command line that fine-tunes the tiny Llama of `helpers.program`."""
    data = f"--sft --train-data-path t={instructions / 'train'} --valid-data-path v={instructions / 'valid'}"
    text_alone = "--train-data-path --valid-data-path --data-cache-path"
    return text.command(f"{data} {more}", without=f"{text_alone} {without}")


@pytest.fixture(scope="module")
def tune(
    text: Text, instructions: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Trained]:
    """(flags, ranks, without) to a run from the common weights; each is run once."""

    def tuning(flags: str, *, without: str = "") -> list[str]:
        return command(text, instructions, f"--load {weights} --finetune {flags}", without=without)

    return each_once(tmp_path_factory.mktemp("runs"), tuning)


ZERO_TOKENS = (
    f"--sat-schedule constant --sat-omission-rate 0.5 --sat-selection-groups 2 {PAPER} --sat-importance magnitude"
)
"""Scores that no token enters, so that other first micro-batches choose alike."""
EPOCH = "--train-epochs 1 --lr-warmup-iters 0"


@pytest.mark.parametrize("method", ["", ZERO_TOKENS], ids=["dense", "sparse"])
def test_an_epoch_in_one_update_is_the_same_packed_and_one_by_one(method: str, tune: Callable[..., Trained]) -> None:
    """Which means: nothing is seen across examples, and each response's token counts alike."""
    flags = f"{method} {EPOCH} --micro-batch-size 1"
    single = tune(f"{flags} --no-sft-packing --global-batch-size {NUMBER['train']}", without="--train-iters")
    packed = tune(f"{flags} --global-batch-size {WINDOWS}", without="--train-iters")
    assert len(single.losses) == len(packed.losses) == 1
    assert_close(packed.losses, single.losses, **RUN_LOSS)
    assert_close(packed.norms, single.norms, **RUN_NORM)
    assert_close([v["v"] for v in packed.validation], [v["v"] for v in single.validation], rtol=1e-5, atol=0)
    other = tune(f"{flags} --global-batch-size {WINDOWS - 1}", without="--train-iters")
    assert abs(other.losses[0] / single.losses[0] - 1) > 20 * RUN_LOSS["rtol"]


LAYOUTS = {
    "tp 2, sequence parallel": (2, f"{TP} --sequence-parallel", ""),
    "pp 2, interleaved": (2, f"{PP} --num-virtual-stages-per-pipeline-rank 2", ""),
    "cp 2": (2, "--context-parallel-size 2", ""),
    "dp 2, distributed optimizer, overlapped": (2, OVERLAPPED, WIDE),
    "full recomputation": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2", ""),
    "recomputed modules": (1, "--recompute-granularity selective --recompute-modules core_attn mlp", ""),
}
PACKED, PADDED = "", "--no-sft-packing"
FAST = {
    "tp 2, sequence parallel": (PACKED, PADDED),
    "pp 2, interleaved": (PACKED,),
    "cp 2": (PACKED,),
    "dp 2, distributed optimizer, overlapped": (PADDED,),
    "full recomputation": (PACKED,),
}
"""What is not among the slow ones."""
EACH = [
    pytest.param(layout, packing, marks=() if packing in FAST.get(layout, ()) else pytest.mark.slow)
    for layout in LAYOUTS
    for packing in (PACKED, PADDED)
]


@pytest.mark.parametrize(("layout", "packing"), EACH)
def test_a_layout_fine_tunes_as_one_process_does(layout: str, packing: str, tune: Callable[..., Trained]) -> None:
    """With scores of the tokens: were padding counted, or a boundary lost in a layout, another choice would show it."""
    ranks, flags, alone = LAYOUTS[layout]
    assert_same_run(tune(f"{SPARSE} {packing} {flags}", ranks), tune(f"{SPARSE} {packing} {alone}"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp 2, sequence parallel", "cp 2", "dp 2, distributed optimizer, overlapped"])
def test_options_that_the_paper_has_not_hold_in_layouts_too(layout: str, tune: Callable[..., Trained]) -> None:
    ranks, flags, alone = LAYOUTS[layout]
    assert_same_run(tune(f"{OURS} {flags}", ranks), tune(f"{OURS} {alone}"))


@needs_deepspeed
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_deepspeed_fine_tunes_as_megatrons_engine_does(stage: int, tune: Callable[..., Trained]) -> None:
    load_library()
    flags = f"{SPARSE} --engine deepspeed --zero-stage {stage}"
    assert_same_run(tune(flags, 2), tune(f"{SPARSE} {WIDE}"))


CUT = ("tp 2, sequence parallel", "cp 2", "pp 2, interleaved")
LONG = "--seq-length 256 --max-position-embeddings 256 --no-sft-packing"


@pytest.mark.parametrize("layout", [None, *mostly_slow(CUT, fast=())])
def test_padding_that_a_micro_batch_has_in_common_is_cut_off_and_changes_nothing(
    text: Text, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str | None
) -> None:
    ranks, flags, _ = LAYOUTS[layout] if layout else (1, "", "")
    argv = command(text, instructions, f"{SPARSE} {LONG} {flags} --train-iters 5 --eval-iters 3")

    def tokens(name: str) -> list[int]:
        return [record["consumed_tokens"] for record in read_records(tmp_path / name)]

    cut = trained(argv, tmp_path / "cut.jsonl", ranks=ranks)
    monkeypatch.setattr(build, "GRAIN", 256)
    whole = trained(argv, tmp_path / "whole.jsonl", ranks=ranks)
    assert_close(cut.losses, whole.losses, **RUN_LOSS)
    assert_close(cut.norms, whole.norms, **RUN_NORM)
    assert_close(cut.validation, whole.validation, **RUN_LOSS)
    assert cut.visits == whole.visits
    assert tokens("whole.jsonl") == [8 * 256 * step for step in range(1, 6)]
    kept = 256 if layout == "pp 2, interleaved" else 64  # stages agree on one length beforehand
    assert tokens("cut.jsonl") == [8 * kept * step for step in range(1, 6)]


def test_another_order_of_examples_is_told_apart(tune: Callable[..., Trained]) -> None:
    run, other = tune(SPARSE), tune(f"{SPARSE} --seed 7 --sat-seed 1234")
    with pytest.raises(AssertionError):
        assert_same_run(run, other)


def test_a_run_resumed_inside_an_epoch_and_a_rung_goes_on_bit_for_bit(
    text: Text, instructions: Path, tmp_path: Path
) -> None:
    jsonl = tmp_path / "metrics.jsonl"
    argv = command(text, instructions, f"{SPARSE} --save {tmp_path} --save-interval 2 --sat-schedule-start 5")
    whole = trained(argv, jsonl)
    resumed = trained([*argv, "--load", str(tmp_path), "--ckpt-step", "4"], jsonl)
    assert_close(resumed.losses, whole.losses, **EXACT)
    assert resumed.weights == whole.weights


def test_data_of_the_other_kind_and_a_batch_beyond_an_epoch_end_in_one_line(text: Text, instructions: Path) -> None:
    given = f"--train-data-path {text.prefix('zh/poetry')}"
    ended = start(command(text, instructions, given))
    assert (ended.codes, ended.err.count("\n")) == ([2], 1)
    assert "fine-tuning needs instruction data" in ended.err
    ended = start(text.command(f"--train-data-path {instructions / 'train'}", without="--train-data-path"))
    assert ended.codes == [2] and "pre-training needs documents" in ended.err


def test_a_rehearsal_counts_the_epochs_too(
    text: Text, instructions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*command(text, instructions, "--train-iters 6"), "--dry-run"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "epochs: t 1.6" in " ".join(said.out.split())  # 48 of 30 and some


def test_the_start_says_what_an_epoch_is(text: Text, instructions: Path) -> None:
    ended = start(command(text, instructions, "--train-epochs 3 --global-batch-size 16", without="--train-iters"))
    said = " ".join(ended.out.split())
    assert f"an epoch is {NUMBER['train']} examples in {WINDOWS} windows of 32" in said
    assert "5 steps of 512 tokens: 2,560 tokens; epochs: t 2.7" in said
