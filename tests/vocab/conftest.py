"""A SentencePiece and a byte-level tokenizer of the shipped text, each extended once."""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_sat.vocab.candidates import train_candidates
from megatron_sat.vocab.extension import Extension, extend, known_texts
from megatron_sat.vocab.source import Source, read_source

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
SHIPPED = DATA / "tokenizer.model"
ADD = 900


def read_texts(pattern: str) -> list[str]:
    return [
        json.loads(line)["text"]
        for path in sorted(DATA.glob(pattern))
        for line in lzma.open(path, "rt", encoding="utf-8")
    ]


@pytest.fixture(scope="session")
def chinese() -> list[str]:
    """Chinese to train on: some 200,000 characters."""
    return read_texts("zh/*.train.jsonl.xz")[::8]


@pytest.fixture(scope="session")
def held_out() -> list[str]:
    """Both languages, not trained on."""
    return read_texts("*/*.dev.jsonl.xz")[::3]


@pytest.fixture(scope="session")
def candidates(chinese: list[str]) -> list[str]:
    """Enough for `ADD` pieces of either tokenizer."""
    known = known_texts(read_source(SHIPPED))
    return train_candidates(lambda: chinese, add=2 * ADD, known=known, coverage=0.99)


@pytest.fixture(scope="session")
def sentencepiece_extension(candidates: list[str]) -> Extension:
    """The shipped tokenizer and `ADD` pieces."""
    return extend(read_source(SHIPPED), candidates=candidates, add=ADD)


@pytest.fixture(scope="session")
def bytelevel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level tokenizer of English in Llama 3's way: special tokens behind the pieces, ignore_merges."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(read_texts("en/*.dev.jsonl.xz")[::4], trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    folder = tmp_path_factory.mktemp("bytelevel")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def bytelevel_source(bytelevel_folder: Path) -> Source:
    return read_source(bytelevel_folder)


@pytest.fixture(scope="session")
def bytelevel_extension(bytelevel_source: Source, candidates: list[str]) -> Extension:
    """The byte-level tokenizer and `ADD` pieces."""
    return extend(bytelevel_source, candidates=candidates, add=ADD)


@pytest.fixture(params=["sentencepiece", "bytelevel"])
def extension(request: pytest.FixtureRequest) -> Iterator[Extension]:
    """One of the two."""
    found: Extension = request.getfixturevalue(f"{request.param}_extension")
    return found
