"""The loss of a text, whatever it is cut into."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sat.vocab.loss import WINDOW, loss_per_character, windows


class Uniform(torch.nn.Module):
    """All of eight tokens are as likely."""

    def forward(self, ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 8))


def test_a_uniform_model_pays_the_same_for_each_token() -> None:
    texts = ["a" * 10, "b" * 20]
    one = loss_per_character(Uniform(), encode=lambda text: [1] * len(text), start=0, texts=texts)
    half = loss_per_character(Uniform(), encode=lambda text: [1] * (len(text) // 2), start=0, texts=texts)
    assert one == pytest.approx(math.log(8))
    assert half == pytest.approx(math.log(8) / 2)


class Next(torch.nn.Module):
    """Sure that the next token is one more."""

    def forward(self, ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=100 * torch.nn.functional.one_hot((ids + 1) % 8, 8).float())


def test_each_token_is_scored_from_those_before_it_and_the_first_from_the_start() -> None:
    rising = loss_per_character(Next(), encode=lambda text: [3, 4, 5], start=2, texts=["abc"])
    assert rising == pytest.approx(0, abs=1e-6)
    assert loss_per_character(Next(), encode=lambda text: [3, 4, 5], start=7, texts=["abc"]) == pytest.approx(100 / 3)


def test_windows_are_the_text_in_order() -> None:
    text = "中" * (2 * WINDOW + 5)
    assert [len(window) for window in windows([text, "", "ab"])] == [WINDOW, WINDOW, 5, 2]
    assert "".join(windows([text])) == text


def test_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="texts for the loss must have characters, got none"):
        loss_per_character(Uniform(), encode=lambda text: [1], start=0, texts=[""])
