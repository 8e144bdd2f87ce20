"""Settings of fine-tuning: epochs as updates, what is refused beside --sft and without it."""

import json
from pathlib import Path

import pytest

from megatron_sat.cli import parse, save_resolved
from megatron_sat.data.prepare import prepare_lines
from megatron_sat.data.sft import SFTConfig
from megatron_sat.data.sft_encode import ChatOptions, chat_job
from megatron_sat.data.sft_template import build_template
from megatron_sat.data.tokenizer import build_tokenizer
from megatron_sat.flags.finetuning import SEED
from megatron_sat.flags.table import table
from tests.helpers.command_line import LADDER, refusal, run

NO_ITERS = "--train-iters --data-path --split --lr-warmup-iters"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 examples of 8 positions: five windows of 64."""
    folder = tmp_path_factory.mktemp("data")
    ids = build_tokenizer("NullTokenizer", vocab_size=256)
    record = {"prompt": "1 2 3 4", "response": "5 6 7 8"}
    (folder / "in.jsonl").write_text(f"{json.dumps(record)}\n" * 40)
    job = chat_job(ChatOptions(), template=build_template("plain", tokenizer=ids))
    inputs = [str(folder / "in.jsonl")]
    prepare_lines(inputs, output_prefix=str(folder / "sft"), tokenizer=ids, job=job, workers=1)
    return f"--sft --train-data-path {folder / 'sft'}"


@pytest.mark.parametrize(("more", "updates"), [("", 3), ("--no-sft-packing", 25), ("--global-batch-size 16", 1)])
def test_epochs_are_said_in_whole_updates(data, more, updates):
    config = run(f"{data} --train-epochs 5 {more}", without=NO_ITERS)
    assert (config.training.train_iters, config.schedule.train_iters) == (updates, updates)
    assert config.settings["train_iters"] == updates
    assert "train_epochs" not in config.settings


def test_the_saved_configuration_of_epochs_given_back_is_the_same_run(data, tmp_path: Path):
    config = run(f"{data} --train-epochs 5 --sft-too-long drop", without=NO_ITERS)
    save_resolved(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")], world_size=1, cuda=False) == config


def test_the_settings_reach_the_data(data):
    assert run(f"{data} --train-iters 3", without=NO_ITERS).sft == SFTConfig()
    config = run(f"{data} --train-iters 3 --no-sft-packing --sft-too-long drop", without=NO_ITERS)
    assert config.sft == SFTConfig(packing=False, too_long="drop")
    assert run().sft is None


def test_tokens_of_responses_count_alike_unless_it_is_said_otherwise(data):
    def per_token(more: str) -> bool:
        return run(f"{data} --train-iters 3 {more}", without=NO_ITERS).transformer["calculate_per_token_loss"]

    assert per_token("")
    assert not per_token("--no-calculate-per-token-loss")
    assert not run().transformer["calculate_per_token_loss"]


@pytest.mark.parametrize(
    ("more", "without", "said"),
    [
        ("--train-epochs 2", "", "--train-epochs has no effect without --sft, which finetune_sat.py says; use"),
        ("--sft --train-epochs 2", "", "--train-epochs and --train-iters say the same thing, got both; leave one out"),
        ("--sft --train-epochs 0", "--train-iters", "--train-epochs must be at least 1, got 0; use --train-iters for"),
        ("--sft --train-epochs 2", "--train-iters --seq-length", "--train-epochs needs --seq-length, got it without"),
        (
            "--sft --train-epochs 2",
            "--train-iters --global-batch-size",
            "--train-epochs needs --global-batch-size, got it without; add it",
        ),
        ("--sft-too-long drop", "", "--sft-too-long has no effect without --sft, which finetune_sat.py says; leave"),
        ("--no-sft-packing", "", "--sft-packing has no effect without --sft, which finetune_sat.py says; leave"),
        (
            "--sft --replay-data-path x --replay-share 0.1",
            "",
            "--replay-data-path, --replay-share have no effect with --sft, which reads every example once an epoch",
        ),
        (f"--sft --layer-graphs {LADDER}", "", "--layer-graphs has no effect with "),
        ("--sft --sft-tokenizer-prompt-format x", "", "--sft-tokenizer-prompt-format is not supported: tokenizers"),
    ],
)
def test_what_says_nothing_beside_the_others_is_refused(capsys, more, without, said):
    assert refusal(capsys, more, without=without).startswith(f"error: {said}")


def test_settings_of_text_are_remarked_upon(data):
    remarks = run(f"{data} --train-iters 3 --eod-mask-loss", without=NO_ITERS).remarks
    assert remarks == ("--eod-mask-loss has no effect with --sft, whose samples are whole examples",)


def test_the_seed_that_epochs_are_counted_with_is_the_runs():
    assert table().flags["seed"].default == SEED
