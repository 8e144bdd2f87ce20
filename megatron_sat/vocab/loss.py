"""Losses and loading through transformers: the only door of this wing to it.

A loss per token cannot be compared across vocabularies, a loss per character can. Shapes: `s` sequence, `v` vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 256
"""Characters that are scored together; the same for both tokenizers, and few enough for any context when spelt in
bytes."""


@torch.no_grad()
def loss_per_character(
    model: torch.nn.Module, *, encode: Callable[[str], list[int]], start: int, texts: Sequence[str]
) -> float:
    """Nats a character needs, summed over all tokens of all texts and divided by their characters.

    model: of transformers, in evaluation mode. start: the token that each window is preceded by; it is not scored.
    Raises ValueError for texts without a character.
    """
    total, characters = 0.0, 0
    for window in windows(texts):
        ids = torch.tensor([[start, *encode(window)]])
        logits = model(ids).logits[0, :-1].float()  # [s, v]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        characters += len(window)
    if not characters:
        raise ValueError("texts for the loss must have characters, got none; give Chinese text with --held-out")
    return total / characters


def windows(texts: Sequence[str]) -> Iterator[str]:
    """The texts in parts of `WINDOW` characters."""
    for text in texts:
        for begin in range(0, len(text), WINDOW):
            yield text[begin : begin + WINDOW]


def load_model(folder: str | Path) -> torch.nn.Module:
    """A causal language model of a Hugging Face folder, in fp32, ready to be evaluated."""
    path = str(Path(folder).resolve())
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    return model.eval()


def load_encoder(folder: str | Path) -> Callable[[str], list[int]]:
    """The tokenizer of a folder as everybody loads it: AutoTokenizer, without special tokens around the text."""
    path = str(Path(folder).resolve())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)
