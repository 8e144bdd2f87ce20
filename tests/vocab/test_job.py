"""The whole job on a tiny model: report, rows, and what stops it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sat.vocab import job
from megatron_sat.vocab.job import ModelSettings, extend_vocabulary, start_token
from megatron_sat.vocab.report import REPORT
from tests.vocab.conftest import SHIPPED
from tests.vocab.models import tiny_llama

ADD = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), rows=4096, dtype=torch.bfloat16)


def run(
    output: Path, *, chinese: list[str], held_out: list[str], model: ModelSettings | None, **changes: Any
) -> dict[str, Any]:
    settings = {"add": ADD, "ready_model": None, "coverage": 0.95} | changes
    domains = {"some": held_out[::2], "others": held_out[1::2]}
    return extend_vocabulary(
        SHIPPED, output=output, documents=lambda: chinese, held_out=domains, model=model, **settings
    )


def test_tokenizer_model_and_report_come_together(
    model: Path, chinese: list[str], held_out: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    settings = ModelSettings(folder=model, tensor_parallel=4, pad_to=64, loss_characters=1000)
    report = run(output, chinese=chinese, held_out=held_out, model=settings)
    assert {p.name for p in output.iterdir()} == {
        *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"),
        *("model.safetensors", REPORT),
    }
    assert report == json.loads((output / REPORT).read_text())
    assert (report["old_tokens"], report["new_tokens"], report["model"]["rows"]) == (4096, ADD, 4608)
    assert set(report["loss_per_character"]) == {"characters", "before", "after"}
    old, new = (load_file(folder / "model.safetensors") for folder in (model, output))
    for name, weight in old.items():
        assert torch.equal(new[name][: len(weight)], weight)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert new[name].shape == (4608, 32) and new[name].dtype == torch.bfloat16
        assert new[name][4096 : 4096 + ADD].unique(dim=0).shape[0] > 0.9 * ADD
        assert (new[name][4096 + ADD :] == new[name][-1]).all()


def test_the_tokenizer_alone_is_extended_without_a_model(
    chinese: list[str], held_out: list[str], tmp_path: Path
) -> None:
    report = run(tmp_path / "out", chinese=chinese, held_out=held_out, model=None)
    assert "model" not in report and not (tmp_path / "out" / "config.json").exists()


def test_a_ready_model_gives_the_pieces(chinese: list[str], held_out: list[str], tmp_path: Path) -> None:
    run(tmp_path / "first", chinese=chinese, held_out=held_out, model=None)
    ready = tmp_path / "first" / "tokenizer.model"
    report = run(tmp_path / "second", chinese=[], held_out=held_out, model=None, ready_model=ready)
    assert report["between"] == [] and report["new_tokens"] == ADD


def test_a_loss_that_rises_too_much_leaves_nothing_behind(
    model: Path, chinese: list[str], held_out: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 4.5])
    monkeypatch.setattr(job, "loss_per_character", lambda *_, **__: next(losses))
    with pytest.raises(
        ValueError, match="may rise by --max-loss-increase \\(1.2\\) at most, it rises from 3.0000 to 4.5000"
    ):
        run(tmp_path / "out", chinese=chinese, held_out=held_out, model=ModelSettings(folder=model))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_loads_otherwise_is_found(
    chinese: list[str], held_out: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_encoder", lambda folder: lambda text: [1])
    with pytest.raises(ValueError, match="AutoTokenizer loads what was proven: "):
        run(tmp_path / "out", chinese=chinese, held_out=held_out, model=None)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_add_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--add must be at least 1, got 0; the paper adds 33000"):
        run(tmp_path / "out", chinese=[], held_out=[], model=None, add=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss_characters": 0}, "--loss-characters must be at least 1, got 0"),
        ({"max_loss_increase": float("nan")}, "--max-loss-increase must be at least 0, got nan"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelSettings(folder=Path("m"), **change)


def test_a_text_begins_after_bos_or_else_eos() -> None:
    assert start_token({"bos_token_id": 1, "eos_token_id": 2}) == 1
    assert start_token({"bos_token_id": None, "eos_token_id": [7, 8]}) == 7
    with pytest.raises(ValueError, match="config.json must have bos_token_id or eos_token_id, it has neither"):
        start_token({})
