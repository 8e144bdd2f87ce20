"""Whole trips of tiny models: imported, compared in every layout, exported; and whatever must stop one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_sat.checkpoint import hf_stream
from megatron_sat.checkpoint.hf_files import Tensors
from megatron_sat.checkpoint.hf_model import load_model, read_config
from megatron_sat.checkpoint.hf_names import NAMES, Row
from megatron_sat.checkpoint.parity import Recorded, Report
from megatron_sat.convert.conversion import export_model, import_model, verify_model
from megatron_sat.data.tokenizer import tokenizer_of_folder
from tests.checkpoint.families import FAMILIES, write_model
from tests.helpers.ranks import run_ranks


def _import(_: int, hf: Path, save: Path, **options: Any) -> None:
    import_model(hf, save, **options)


def _export(_: int, load: Path, hf: Path, **options: Any) -> None:
    export_model(load, hf, **options)


def _verify(_: int, load: Path, hf: Path, **options: Any) -> list[Report]:
    return verify_model(load, hf, **options)


def _round_trip(_: int, hf: Path, save: Path, out: Path) -> None:
    import_model(hf, save, tp=2)
    export_model(save, out)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model, and its import."""
    folder = tmp_path_factory.mktemp("llama")
    write_model("tinyllama", folder / "hf")
    run_ranks(_import, 1, folder / "hf", folder / "save", tp=2)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_through_both_gates_and_back_bit_for_bit(tmp_path, family):
    hf = write_model(family, tmp_path / "hf")
    run_ranks(_round_trip, 1, hf, tmp_path / "save", tmp_path / "out")

    before, after = Tensors(hf), Tensors(tmp_path / "out")
    assert after.shapes == before.shapes
    assert all(torch.equal(after.read(name), before.read(name)) for name in before.shapes)
    assert read_config(tmp_path / "out") == read_config(hf)


@pytest.mark.parametrize("family", ["llama-biased", "qwen2-tied", "qwen3"])
def test_logits_are_equal_in_every_layout_of_four_ranks(tmp_path, family):
    hf = write_model(family, tmp_path / "hf")
    run_ranks(_import, 1, hf, tmp_path / "save", tp=4, gate=None)
    reports = run_ranks(_verify, 4, tmp_path / "save", hf)[0]

    layouts = [report.layout for report in reports]
    assert layouts == ["TP=1, PP=1", "TP=2, PP=1", "TP=4, PP=1", "TP=1, PP=2", "TP=2, PP=2"]
    assert all(report.max_delta <= 2e-5 for report in reports)


def test_an_export_says_the_same_text(tmp_path, llama):
    run_ranks(_export, 1, llama / "save", tmp_path / "out")
    prompt = torch.tensor([[3, 50, 7]])
    texts = [
        load_model(folder, dtype=torch.float32, device=torch.device("cpu")).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False
        )
        for folder in (llama / "hf", tmp_path / "out")
    ]
    assert torch.equal(*texts)


def test_an_import_leaves_flags_tokenizer_and_loss_beside_the_weights(llama):
    save = llama / "save"
    flags = yaml.safe_load((save / "model.yaml").read_text())
    assert flags["data"]["tokenizer_model"] == str(save / "hf")
    assert flags["model"]["padded_vocab_size"] == 512 and flags["model"]["num_query_groups"] == 4
    recorded = Recorded.load(save / "recorded_loss.json")
    assert len(recorded.losses) == len(recorded.ids) - 1 == 255
    assert recorded.padded_vocab_size == 512
    assert sorted(path.name for path in save.iterdir()) == [
        "hf",
        "latest_checkpointed_iteration.txt",
        "model.yaml",
        "recorded_loss.json",
        "release",
    ]


# -- the gate sees what is wrong


def _exchanged(layout: str, first: int, second: int) -> list[Row]:
    """The table with two of a fused tensor's parts in each other's place."""
    table = []
    for row in NAMES:
        theirs = list(row.theirs)
        if row.layout == layout:
            theirs[first], theirs[second] = theirs[second], theirs[first]
        table.append(replace(row, theirs=tuple(theirs)))
    return table


def _norms_exchanged() -> list[Row]:
    keys = {"self_attention.linear_qkv.layer_norm_weight": "mlp.linear_fc1.layer_norm_weight"}
    keys |= {there: here for here, there in keys.items()}
    short = {row.megatron.removeprefix("decoder.layers."): row for row in NAMES}
    return [
        replace(row, theirs=short[keys[name]].theirs) if name in keys else row for name, row in short.items()
    ]


@pytest.mark.parametrize(
    "table, place",
    [
        (_exchanged("gate_up", 0, 1), "layer 0 MLP"),
        (_exchanged("qkv", 1, 2), "layer 0 attention"),
        (_norms_exchanged(), "layer 0 attention"),
    ],
    ids=["gate and up", "key and value", "the two norms"],
)
def test_a_wrong_table_fails_the_gate_which_names_the_place_and_leaves_nothing(tmp_path, llama, table, place):
    with pytest.raises(RuntimeError, match=f"must compute the same: .* first place that differs: {place}"):
        run_ranks(_import, 1, llama / "hf", tmp_path / "save", table=table)
    assert list(tmp_path.iterdir()) == []


def test_an_export_by_a_wrong_table_fails_the_gate_and_leaves_nothing(tmp_path, llama):
    with pytest.raises(RuntimeError, match="must compute the same: .* first place that differs: layer 0 MLP"):
        run_ranks(_export, 1, llama / "save", tmp_path / "out", table=_exchanged("gate_up", 0, 1))
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_not_verified(tmp_path, llama):
    other = write_model("llama-linear", tmp_path / "other")
    with pytest.raises(RuntimeError, match="TP=1, PP=1.*first place that differs: layer 0 attention"):
        run_ranks(_verify, 2, llama / "save", other)


def test_bf16_is_compared_by_the_likeliest_token(llama):
    (reports,) = run_ranks(_judge_bf16, 1, llama / "save", llama / "hf")
    assert [report.dtype for report in reports] == [torch.bfloat16]
    assert reports[0].same_top >= 0.95 and reports[0].max_delta > 1e-3


def _judge_bf16(_: int, load: Path, hf: Path) -> list[Report]:
    """Random logits nearly tie, so that the gate's 99 % would be chance; take the report alone."""
    found: list[Report] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_sat.checkpoint.parity.refuse", found.append)
        verify_model(load, hf, dtypes=("bf16",))
    return found


# -- interrupted, or refused


def _interrupted(_: int, work: Callable[..., None], *arguments: Path, at: str) -> None:
    """The process is interrupted when it has begun to write weights."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at, stop)
        with pytest.raises(KeyboardInterrupt):
            work(*arguments)


def test_an_interrupted_import_leaves_nothing(tmp_path, llama):
    arguments = (import_model, llama / "hf", tmp_path / "save")
    run_ranks(_interrupted, 1, *arguments, at="megatron_sat.checkpoint.hf_stream.torch.save")
    assert list(tmp_path.iterdir()) == []
    assert hf_stream.torch.save is torch.save


def test_an_interrupted_export_leaves_nothing(tmp_path, llama):
    arguments = (export_model, llama / "save", tmp_path / "out")
    run_ranks(_interrupted, 1, *arguments, at="megatron_sat.checkpoint.hf_files.save_file")
    assert list(tmp_path.iterdir()) == []


def test_import_is_the_work_of_one_process(tmp_path, llama):
    with pytest.raises(RuntimeError, match="import and export are the work of one process, got 2 ranks"):
        run_ranks(_import, 2, llama / "hf", tmp_path / "save")


def test_a_tensor_parallel_size_that_does_not_fit_is_refused(tmp_path, llama):
    with pytest.raises(RuntimeError, match="3 does not divide 4 query groups; choose a smaller one"):
        run_ranks(_import, 1, llama / "hf", tmp_path / "save", tp=3)


def test_an_export_like_another_model_is_refused(tmp_path, llama):
    other = write_model("llama-linear", tmp_path / "other")
    with pytest.raises(RuntimeError, match="(?s)config.json must describe the model of .*interpolation_factor: 4 by"):
        run_ranks(_export, 1, llama / "save", tmp_path / "out", like=other)
    with pytest.raises(RuntimeError, match="--like must be a model's folder with config.json"):
        run_ranks(_export, 1, llama / "save", tmp_path / "out", like=tmp_path / "nothing")


def test_a_run_whose_tokenizer_has_no_configuration_beside_it_is_exported_by_its_settings(tmp_path, llama):
    """As a model is that was trained from the start."""
    run_ranks(_import, 1, llama / "hf", tmp_path / "save", gate=None)
    (tmp_path / "save" / "hf" / "config.json").unlink()
    run_ranks(_export, 1, tmp_path / "save", tmp_path / "out")

    config = read_config(tmp_path / "out")
    before, after = Tensors(llama / "hf"), Tensors(tmp_path / "out")
    assert (config["model_type"], config["vocab_size"], config["num_key_value_heads"]) == ("llama", 300, 4)
    tokenizer = tokenizer_of_folder(tmp_path / "save" / "hf")
    begins = tokenizer.bos if tokenizer.bos >= 0 else None
    assert (config["bos_token_id"], config["eos_token_id"]) == (begins, tokenizer.eod)
    assert all(torch.equal(after.read(name), before.read(name)) for name in before.shapes)
