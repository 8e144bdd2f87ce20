"""Models with more rows: everything else bit for bit as it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sat.vocab.model_files import check_rows, grow, read_config, resize_model
from tests.helpers.tolerances import FP32_SUMS
from tests.vocab.models import load_by_hand, tiny_llama

OLD, ROWS = 40, 64


def resize(weight: torch.Tensor) -> torch.Tensor:
    return grow(weight, added=torch.full((10, 32), 7.0), padding=torch.full((32,), 9.0), first=OLD, rows=ROWS)


def test_rows_are_old_added_padding_and_the_former_padding_is_gone() -> None:
    old = torch.randn(48, 32, dtype=torch.bfloat16)
    new = resize(old)
    assert new.dtype == torch.bfloat16 and new.shape == (ROWS, 32)
    assert torch.equal(new[:OLD], old[:OLD])
    assert (new[OLD : OLD + 10] == 7).all() and (new[OLD + 10 :] == 9).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "12KB"])
def test_a_resized_model_loads_and_says_of_old_tokens_what_the_old_one_said(
    tied: bool, shard: str, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "old", rows=OLD, tied=tied, shard=shard)
    target = tmp_path / "new"
    target.mkdir()
    resize_model(folder, target=target, rows=ROWS, resize=resize)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "12KB")
    old, new = (load_by_hand(f) for f in (folder, target))
    assert new.config.vocab_size == ROWS
    ids = torch.arange(OLD)[None]
    torch.testing.assert_close(new(ids).logits[..., :OLD], old(ids).logits, **FP32_SUMS)
    assert (new.get_output_embeddings().weight[OLD : OLD + 10] == 7).all()
    if shard == "12KB":
        index = json.loads((target / "model.safetensors.index.json").read_text())
        sizes = [t.numel() * t.element_size() for f in target.glob("*.safetensors") for t in load_file(f).values()]
        assert index["metadata"]["total_size"] == sum(sizes)
    assert (target / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="--model must be a Hugging Face folder with config.json and \\*.safetensors"):
        read_config(tmp_path)


def test_a_model_with_fewer_rows_than_tokens_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "old", rows=OLD)
    check_rows(folder, tokens=OLD)
    with pytest.raises(
        ValueError, match="weight must have a row for each of the 41 tokens, it has 40; give the tokenizer"
    ):
        check_rows(folder, tokens=OLD + 1)


@pytest.mark.parametrize("missing", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_model_without_embedding_or_head_is_refused(missing: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "old", rows=OLD)
    weights = load_file(folder / "model.safetensors")
    del weights[missing]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"--model must have the weight {missing}"):
        check_rows(folder, tokens=OLD)
