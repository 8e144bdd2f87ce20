"""Small texts, tokenizers and prepared data sets for the tests of this folder."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from megatron_sat.data.encode import TextOptions
from megatron_sat.data.prepare import prepare
from megatron_sat.data.tokenizer import Tokenizer, build_tokenizer

EXCERPT = Path(__file__).parents[2] / "examples" / "data"
TEXTS = [
    "Call me Ishmael. Some years ago - never mind how long precisely -",
    "滚滚长江东逝水，浪花淘尽英雄。",
    "  two blanks before, one after ",
    "line one\nline two\n\ttabbed",
    "2097 steps at 0.3, then 0.2",
    "</s> <s> <unk> are seven characters of text, not tokens",
    "𠮷 is outside the basic plane, 🙂 too",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer shipped for the demo."""
    return build_tokenizer("SentencePieceTokenizer", model=str(EXCERPT / "tokenizer.model"))


@pytest.fixture(scope="session")
def ids() -> Tokenizer:
    """Text is its own ids: what a test writes is what it reads."""
    return build_tokenizer("NullTokenizer", vocab_size=1000)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes records (or bare texts) to a .jsonl file and returns its path."""

    def write(records: Iterable[dict | str], name: str = "in.jsonl") -> str:
        lines = (json.dumps({"text": r} if isinstance(r, str) else r, ensure_ascii=False) for r in records)
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return str(tmp_path / name)

    return write


@pytest.fixture
def corpus(tmp_path: Path, jsonl: Callable[..., str], ids: Tokenizer) -> Callable[..., str]:
    """Prepares documents given as lists of ids, each ended by the end-of-document id; returns the prefix."""

    def make(name: str, documents: Iterable[Iterable[int]]) -> str:
        path = jsonl([" ".join(map(str, document)) for document in documents], name=f"{name}.jsonl")
        prefix = str(tmp_path / name)
        prepare([path], output_prefix=prefix, tokenizer=ids, options=TextOptions(append_eod=True), workers=1)
        return prefix

    return make
