"""What is known of a model before it is loaded: its tokenizer, its rows, and what keeps it from being evaluated."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from megatron_sat.checkpoint.resume import open_checkpoint
from megatron_sat.convert.conversion import import_model
from megatron_sat.evaluate.windows import batches_of, windows_of
from megatron_sat.evaluation import models
from megatron_sat.evaluation.models import Subject, hugging_face_model, megatron_model
from tests.checkpoint.families import SENTENCEPIECE, write_model
from tests.helpers.ranks import run_ranks


def _import(_: int, hf: Path, save: Path) -> None:
    import_model(hf, save, gate=None)


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model with rows beyond its tokenizer's that would be likeliest everywhere, and its import, which adds more."""
    folder = tmp_path_factory.mktemp("padded")
    write_model("tinyllama", folder / "hf")
    shutil.copytree(folder / "hf", folder / "exact")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    model.resize_token_embeddings(320, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[300:] = 50.0 * torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "hf")
    run_ranks(_import, 1, folder / "hf", folder / "save")
    return folder


def nats(subject: Subject) -> float:
    """Of one short text of ids."""
    windows = list(windows_of(np.arange(3, 40), start=subject.start, seq_length=64, stride=32))
    ((batch,),) = batches_of(windows, size=1, together=1, part=0, parts=1)
    return subject.open("fp32", 64).score([batch])


def _three(_: int, folder: Path) -> list[tuple[int, float]]:
    subjects = [
        hugging_face_model(folder / "exact"),
        hugging_face_model(folder / "hf"),
        megatron_model(folder / "save"),
    ]
    return [(subject.vocab_size, nats(subject)) for subject in subjects]


def test_rows_beyond_the_tokenizer_count_in_neither_kind_of_model(padded):
    ((exact, resized, imported),) = run_ranks(_three, 1, padded)
    assert exact[0] == resized[0] == imported[0]
    assert resized[1] == pytest.approx(exact[1], rel=1e-6)
    assert imported[1] == pytest.approx(exact[1], rel=1e-6)


def _counted(_: int, folder: Path) -> tuple[float, float]:
    subject = hugging_face_model(folder / "hf")
    opened = subject.open("fp32", 64)
    all_rows = models.hugging_face_scorer(
        models.load_model(folder / "hf", dtype=torch.float32, device=torch.device("cpu")), vocab_size=320
    )
    return nats(subject), nats(replace(subject, open=lambda dtype, length: replace(opened, score=all_rows)))


def test_they_would_be_seen_if_they_counted(padded):
    ((left_out, counted),) = run_ranks(_counted, 1, padded)
    assert counted > left_out + 10


def _describe(_: int, folder: Path) -> tuple[Any, ...]:
    subject = megatron_model(folder / "save")
    return subject.kind, subject.step, subject.longest, subject.start, subject.tokenizer.bos


def test_a_checkpoint_says_what_it_holds(padded):
    assert run_ranks(_describe, 1, padded)[0] == ("megatron", 0, 512, 0, 0)


def test_a_document_begins_behind_bos_or_else_behind_what_ends_one(padded):
    subject = hugging_face_model(padded / "exact")
    assert subject.start == subject.tokenizer.bos
    without = replace(subject, tokenizer=replace(subject.tokenizer, bos=-1))
    assert without.start == subject.tokenizer.eod != subject.start


def _selected(_: int, folder: Path) -> str:
    models.sparse_modules = lambda chunks: ["a module"]  # type: ignore[assignment]  in this rank alone
    with pytest.raises(AssertionError) as caught:
        megatron_model(folder / "save").open("fp32", 64)
    return str(caught.value)


def test_a_model_with_selectors_would_not_be_evaluated(padded):
    assert run_ranks(_selected, 1, padded)[0].startswith("an evaluated model is dense")


# -- tokenizers


def _refusal(_: int, folder: Path, options: dict[str, Any], config: dict[str, Any] | None) -> str:
    """What a checkpoint is refused with; config: changes of what it says about its run, None removes."""

    def opened(load: Path, *, step: int | None) -> Any:
        checkpoint = open_checkpoint(load, step=step)
        said = {**checkpoint.header.config, **(config or {})}
        return replace(checkpoint, header=replace(checkpoint.header, config=said))

    models.open_checkpoint = opened  # in this rank alone
    try:
        megatron_model(folder / "save", **options)
    except ValueError as error:
        return str(error)
    return "nothing"


def refusal(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> str:
    return run_ranks(_refusal, 1, folder, options, config)[0]


def test_a_checkpoint_without_a_tokenizer_is_refused(padded):
    for key in ("tokenizer_type", "tokenizer_model"):
        assert refusal(padded, {key: None}).endswith("release does not; give --tokenizer-type and --tokenizer-model")


def test_a_tokenizer_that_has_moved_is_asked_for_and_can_be_given(padded):
    gone = {"tokenizer_model": "/nowhere/hf"}
    said = refusal(padded, gone)
    assert said.startswith("a checkpoint's tokenizer must be where it was, /nowhere/hf does not exist; say with")
    assert refusal(padded, gone, tokenizer_model=str(padded / "exact")) == "nothing"


def test_another_tokenizer_is_refused(padded):
    said = refusal(padded, tokenizer_type="Llama2Tokenizer", tokenizer_model=str(SENTENCEPIECE))
    assert said.startswith("the tokenizer must be the checkpoint's (") and "tokenizer.model is another" in said


def test_a_model_without_a_tokenizer_is_refused(padded, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(padded / "exact" / name, tmp_path / name)
    with pytest.raises(ValueError, match="tokenizer_model must be a Hugging Face tokenizer"):
        hugging_face_model(tmp_path)


def test_a_configuration_without_positions_is_refused(tmp_path):
    GPT2Config(n_layer=1, n_head=1, n_embd=4).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"config\.json must have max_position_embeddings, it has not; evaluate a model"
    ):
        hugging_face_model(tmp_path)


def test_tokens_without_a_row_are_said(padded, tmp_path):
    shutil.copytree(padded / "exact", tmp_path / "hf")
    shutil.copyfile(SENTENCEPIECE, tmp_path / "hf" / "tokenizer.model")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match=r"has 4096 tokens and .*hf 300 rows: text that needs the others is refused"):
        assert hugging_face_model(tmp_path / "hf").vocab_size == 300


def _rows(_: int, folder: Path, config: dict[str, Any], keep: bool) -> int:
    checkpoint = open_checkpoint(folder / "save")
    path = folder / ("exact" if keep else "exact/tokenizer.json")
    found = replace(hugging_face_model(folder / "exact").tokenizer, path=str(path))
    checkpoint = replace(checkpoint, header=replace(checkpoint.header, config=config))
    if not keep:
        (folder / "exact" / "config.json").unlink()
    return models._rows_of(checkpoint, tokenizer=found, padded=384)


def test_a_checkpoints_rows_are_what_the_import_kept_or_the_run_said(padded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(padded, copy)
    assert run_ranks(_rows, 1, copy, {"vocab_size": 310}, True) == [300]
    assert run_ranks(_rows, 1, copy, {"vocab_size": 310}, False) == [310]
    shutil.copyfile(padded / "exact" / "config.json", copy / "exact" / "config.json")
    assert run_ranks(_rows, 1, copy, {}, False) == [384]
