"""Folders that are there whole or not at all, and what is in them."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_sat.vocab.extension import Extension
from megatron_sat.vocab.source import Source, read_source
from megatron_sat.vocab.write import staged, write_tokenizer
from tests.vocab.conftest import SHIPPED
from tests.vocab.models import tiny_llama


def test_a_folder_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with staged(output) as folder:
        (folder / "a").write_text("1")
        assert not output.exists()
    assert [p.name for p in output.parent.iterdir()] == ["out"]
    assert (output / "a").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_of_a_folder_that_failed(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".out.unfinished"
    left.mkdir()
    (left / "stale").touch()
    with staged(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="--output must not exist yet, .* does; remove it or name another"),
        staged(tmp_path),
    ):
        pass


@pytest.mark.parametrize("model_type", [None, "llama"])
def test_auto_tokenizer_gives_the_proven_ids(
    model_type: str | None, sentencepiece_extension: Extension, held_out: list[str], tmp_path: Path
) -> None:
    """transformers 5 rebuilds some classes' tokenizers, and cuts off a leading space in them."""
    write_tokenizer(sentencepiece_extension, source=read_source(SHIPPED), target=tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    form = sentencepiece_extension.new[0]
    for text in [" 中文", "  a", "", "中国 a\n", *held_out[:20]]:
        assert loaded.encode(text, add_special_tokens=False) == form.encode(text)
        assert loaded.decode(form.encode(text)) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)
    assert loaded("a")["input_ids"][0] == 1


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3"])
def test_a_byte_level_folder_keeps_its_settings_and_template(
    model_type: str | None, bytelevel_extension: Extension, bytelevel_folder: Path, held_out: list[str], tmp_path: Path
) -> None:
    folder, target = tmp_path / "old", tmp_path / "new"
    shutil.copytree(bytelevel_folder, folder)
    target.mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 77, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    source: Source = read_source(folder)
    write_tokenizer(bytelevel_extension, source=source, target=target)
    if model_type:
        (target / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(str(target), local_files_only=True)
    assert loaded.model_max_length == 77 and loaded.chat_template == "{{ messages }}"
    assert "legacy" not in json.loads((target / "tokenizer_config.json").read_text())
    assert loaded.eos_token_id == 701 and loaded("<|end_of_text|>")["input_ids"] == [701]
    for text in held_out[:20]:
        assert loaded.encode(text, add_special_tokens=False) == bytelevel_extension.new[0].encode(text)


def test_a_sentencepiece_folder_keeps_what_it_said(sentencepiece_extension: Extension, tmp_path: Path) -> None:
    folder, target = tiny_llama(tmp_path / "old", rows=8), tmp_path / "new"
    target.mkdir()
    shutil.copy(SHIPPED, folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "pad_token": "</s>", "add_prefix_space": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_tokenizer(sentencepiece_extension, source=read_source(folder), target=target)
    written = json.loads((target / "tokenizer_config.json").read_text())
    assert (written["tokenizer_class"], written["pad_token"]) == ("PreTrainedTokenizerFast", "</s>")
    assert "add_prefix_space" not in written
