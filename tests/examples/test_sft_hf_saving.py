"""What examples/sft_hf.py leaves beside the weights of a model."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.sft_hf import main
from tests.examples.test_sft_hf import RECORDS, flags, write
from tests.helpers.tiny_chat import save_chat_llama


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model (in model/), train.jsonl and dev.jsonl."""
    save_chat_llama(tmp_path / "model")
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.jsonl", RECORDS[:2])
    return tmp_path


def test_the_tokenizer_is_saved_as_it_is_also_where_transformers_cannot_open_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral's, where mistral-common lacks packages of its own: the run would end without its model."""
    finds, config = importlib.util.find_spec, place / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))

    def without_tiktoken(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'tiktoken'")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", without_tiktoken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: name == "mistral_common" or finds(name, *more))
    main(flags(place, "full", "--train-iters", "1"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (place / "out" / name).read_bytes() == (place / "model" / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(place / "out").config.dtype == torch.float32, "as it was trained"


def test_a_model_may_be_trained_in_its_own_folder(place: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(place / "model").lm_head.weight.clone()
    main([*flags(place, "full", "--train-iters", "1"), "--save", str(place / "model")])
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(place / "model").lm_head.weight, before)


OTHERS: list[tuple[str, list[str], str]] = [
    ("spdf", ["--spdf-rate", "1/4"], "--spdf-rate must be that of the checkpoint in --resume, 1/2, got 1/4"),
    ("spdf", ["--lr", "1e-3"], "--lr must be that of the checkpoint in --resume, 0.005, got 0.001"),
    ("spdf", ["--seed", "7"], "--seed must be that of the checkpoint in --resume, 1234, got 7"),
    ("spdf", ["--global-batch-size", "1"], "--global-batch-size must be that of the checkpoint in --resume, 2, got 1"),
    ("spdf", ["--train-iters", "3"], r"--train-iters \(or what --epochs comes to\) must be .* --resume, 2, got 3"),
    ("spdf", ["--template", "plain"], r"--data \(by --template and --max-tokens\) must be .*, 2 examples \([0-9a-f]+"),
    ("full", [], "--method must be that of the checkpoint in --resume, spdf, got full; resume with the same, or"),
]


def test_a_checkpoint_of_another_run_is_not_resumed(place: Path) -> None:
    argv = ["--train-iters", "2", "--save-interval", "1", "--resume", str(place / "out" / "checkpoint-1")]
    main(flags(place, "spdf", *argv[:-2]))
    main(flags(place, "spdf", *argv))
    for method, more, said in OTHERS:
        with pytest.raises(ValueError, match=said):
            main(flags(place, method, *argv, *more))
