"""Weights in and out again, bit for bit; and what does not fit is refused before anything is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sat.checkpoint.header import Header
from megatron_sat.checkpoint.hf_config import dimensions_of, features_of
from megatron_sat.checkpoint.hf_export import export_weights
from megatron_sat.checkpoint.hf_files import SINGLE, Tensors
from megatron_sat.checkpoint.hf_import import import_weights
from megatron_sat.checkpoint.hf_model import read_config
from megatron_sat.checkpoint.hf_names import NAMES, Features
from megatron_sat.checkpoint.resume import open_checkpoint
from tests.checkpoint.families import FAMILIES, write_model

HEADER = Header(iteration=0, consumed_train_samples=0, tokenizer=None, config={"a": 1})


def _model(hf: Path, *, rows: int = 512) -> dict[str, Any]:
    config = read_config(hf)
    rows = max(rows, config["vocab_size"])
    return {"features": features_of(config), "dims": dimensions_of(config, padded_vocab_size=rows)}


def _import(hf: Path, root: Path, **changes: Any) -> None:
    import_weights(hf, root, **{**_model(hf), "header": HEADER, **changes})


def _rewrite(hf: Path, **changes: Any) -> None:
    """Change tensors of a model's file; None: leave the tensor out. Dots are written as __."""
    weights = load_file(hf / SINGLE)
    for name, change in changes.items():
        weights[name.replace("__", ".")] = change
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, hf / SINGLE)


@pytest.fixture
def llama(tmp_path):
    return write_model("tinyllama", tmp_path / "hf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_bit_for_bit(tmp_path, family, dtype):
    hf = write_model(family, tmp_path / "hf", dtype=dtype, shard="50KB")
    _import(hf, tmp_path)
    (tmp_path / "back").mkdir()
    export_weights(open_checkpoint(tmp_path), tmp_path / "back", **_model(hf), max_shard_bytes=30_000)

    before, after = Tensors(hf), Tensors(tmp_path / "back")
    assert after.shapes == before.shapes and after.dtypes == before.dtypes
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert all(torch.equal(after.read(name), before.read(name)) for name in before.shapes)


def test_an_import_is_a_release_that_says_what_it_holds(tmp_path, llama):
    _import(llama, tmp_path)
    opened = open_checkpoint(tmp_path)
    assert opened.release and opened.iteration == 0
    assert opened.header is not None and opened.header.config == {"a": 1}


def test_weights_are_converted_where_that_is_asked_for(tmp_path, llama):
    _import(llama, tmp_path, dtype=torch.bfloat16)
    (tmp_path / "back").mkdir()
    export_weights(open_checkpoint(tmp_path), tmp_path / "back", **_model(llama), dtype=torch.float16)

    before, after = Tensors(llama), Tensors(tmp_path / "back")
    assert set(after.dtypes.values()) == {torch.float16}
    assert all(torch.equal(after.read(n), before.read(n).bfloat16().half()) for n in before.shapes)


def test_missing_and_unexpected_tensors_are_listed_and_nothing_is_written(tmp_path, llama):
    _rewrite(llama, model__norm__weight=None, visual__weight=torch.zeros(2))
    with pytest.raises(ValueError, match="(?s)missing: model.norm.weight.*unexpected: visual.weight.*was written"):
        _import(llama, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tensor_of_another_shape_is_named_and_nothing_is_written(tmp_path, llama):
    _rewrite(llama, model__layers__2__self_attn__k_proj__weight=torch.zeros(8, 32))
    with pytest.raises(ValueError, match="layers.2.self_attn.k_proj.weight.*: query, key and value must be"):
        _import(llama, tmp_path)
    assert not (tmp_path / "release").exists()


def test_mixed_types_of_one_tensor_need_a_choice(tmp_path, llama):
    _rewrite(llama, model__layers__2__input_layernorm__weight=torch.ones(32).bfloat16())
    with pytest.raises(ValueError, match="must have one type, got torch.bfloat16 and torch.float32; pass --dtype"):
        _import(llama, tmp_path)
    _import(llama, tmp_path, dtype=torch.float32)


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path):
    hf = write_model("smollm2", tmp_path / "hf")
    embedding = load_file(hf / SINGLE)["model.embed_tokens.weight"]
    _rewrite(hf, lm_head__weight=embedding.clone())
    _import(hf, tmp_path / "one")

    _rewrite(hf, lm_head__weight=embedding + 1)
    with pytest.raises(ValueError, match="lm_head.weight must be model.embed_tokens.weight, they differ"):
        _import(hf, tmp_path / "two")


def test_a_table_with_two_rows_exchanged_is_seen_as_another_model(tmp_path, llama):
    """What no gate is needed for: shapes differ. What needs it, stands in tests/convert."""
    _import(llama, tmp_path)
    short = [row for row in NAMES if "final" not in row.megatron]
    (tmp_path / "back").mkdir()
    with pytest.raises(ValueError, match="unexpected: decoder.final_layernorm.weight"):
        export_weights(open_checkpoint(tmp_path), tmp_path / "back", **_model(llama), table=short)
    assert list((tmp_path / "back").iterdir()) == []


def test_an_export_of_another_number_of_layers_or_rows_is_refused(tmp_path, llama):
    _import(llama, tmp_path)
    other = Features(num_layers=3, untied=True, qk_norm=True)
    (tmp_path / "back").mkdir()
    with pytest.raises(ValueError, match="(?s)missing: .*q_layernorm.weight.*4 layers, 3 wanted.*--like"):
        export_weights(open_checkpoint(tmp_path), tmp_path / "back", **_model(llama) | {"features": other})
    with pytest.raises(ValueError, match="512 rows, 600 wanted"):
        export_weights(open_checkpoint(tmp_path), tmp_path / "back", **_model(llama, rows=600))
