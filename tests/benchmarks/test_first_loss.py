"""The loss of a first sparse step: of every way of choosing, on the same text, with the model unharmed."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from benchmarks import first_loss
from tests.hf.models import make_model

TEXT = Path(__file__).parents[2] / "examples" / "data" / "en" / "technology.dev.jsonl.xz"


def test_every_way_is_measured_once(tmp_path, monkeypatch, capsys):
    model, ids = make_model(), torch.arange(24).view(1, -1)
    monkeypatch.setattr(first_loss, "load_model", lambda folder, **_: model)
    monkeypatch.setattr(first_loss, "window", lambda args: ids)
    line = ["--hf", "tiny", "--text", "text.jsonl", "--rates", "1/2", "--modules", "all", "mlp", "--whole-ends", "0"]
    first_loss.main([*line, "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    ways = [(row["modules"], row["importance"], row["selection"]) for row in found["rows"]]
    assert len(ways) == len(set(ways)) == 2 * (1 + 4 * 2)
    with torch.no_grad():
        dense = float(model(input_ids=ids, labels=ids).loss)
    assert found["dense"] == dense
    assert all(row["loss"] != dense for row in found["rows"])
    assert f"dense {dense:.3f}" in capsys.readouterr().out


def test_a_first_loss_is_that_of_a_step(monkeypatch):
    """Nothing is left of it: the second time is as the first."""
    model, ids = make_model(), torch.arange(24).view(1, -1)
    selection = {"importance": "contribution", "selection": "top-k", "modules": "mlp", "whole_ends": 0}
    losses = [first_loss.first_loss(model, ids, rate=Fraction(1, 2), **selection) for _ in range(2)]
    assert losses[0] == losses[1]
    assert first_loss.first_loss(model, ids, rate=Fraction(1, 4), **selection) != losses[0]


def window(tmp_path, *, tokens: int) -> torch.Tensor:
    line = ["--hf", str(tmp_path), "--text", str(TEXT), "--tokens", str(tokens)]
    return first_loss.window(first_loss.arguments(line))


def test_the_window_is_the_texts_beginning(tmp_path, monkeypatch):
    tokenizer = first_loss.tokenizer_of_folder
    monkeypatch.setattr(first_loss, "tokenizer_of_folder", lambda _: tokenizer(TEXT.parents[1]))
    assert window(tmp_path, tokens=8).equal(window(tmp_path, tokens=16)[:, :8])
    with pytest.raises(ValueError, match="--text must have 100000000 tokens, it has .*; give more text or fewer"):
        window(tmp_path, tokens=10**8)


def test_a_rate_must_leave_something_and_take_something(capsys):
    with pytest.raises(SystemExit):
        first_loss.arguments(["--hf", "tiny", "--text", "text.jsonl", "--rates", "0"])
    assert "--rates must lie between 0 and 1; dense, rate 0, is always measured" in capsys.readouterr().err
