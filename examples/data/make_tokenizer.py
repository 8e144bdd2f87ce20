#!/usr/bin/env python3
"""Train a small SentencePiece BPE model in Llama's layout on the excerpt beside this file.

    make_tokenizer.py            tokenizer.model: Chinese and English, 4,096 pieces
    make_tokenizer.py --english  en/tokenizer.model: English alone, 2,048 pieces, to be extended by the demo

``<unk> <s> </s>`` are 0 1 2, the 256 bytes follow, then merges and characters, a multiple of 128 in all, so that no
padding is needed at TP 1 to 8. Characters beyond the coverage are spelt in bytes. Text comes back as it went in.
"""

import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
PIECES = 4096
COVERAGE = 0.99
"""Fraction of the text whose characters are pieces; at 4,096 pieces more of it would leave no room for
merges."""
ENGLISH = HERE / "en" / "tokenizer.model"
ENGLISH_PIECES = 2048
ENGLISH_COVERAGE = 0.9995


def paragraphs(language: str = "*") -> Iterator[str]:
    """All training text, or that of one language."""
    for path in sorted(HERE.glob(f"{language}/*.train.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield from filter(None, json.loads(line)["text"].split("\n"))


def main(output: Path, *, language: str = "*", pieces: int = PIECES, coverage: float = COVERAGE) -> None:
    """Train and write the model."""
    with output.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=paragraphs(language),
            model_writer=model,
            model_type="bpe",
            vocab_size=pieces,
            character_coverage=coverage,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=100_000,
            num_threads=1,
            minloglevel=2,
        )
    print(f"{output}: {output.stat().st_size:,} bytes")


def english(output: Path) -> None:
    """Train and write the English model."""
    main(output, language="en", pieces=ENGLISH_PIECES, coverage=ENGLISH_COVERAGE)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main(HERE / "tokenizer.model")
        case ["--english"]:
            english(ENGLISH)
        case _:
            sys.exit(f"usage: {Path(sys.argv[0]).name} [--english]")
