#!/usr/bin/env python3
"""Train the demo's tokenizer on the excerpt beside this file: a small SentencePiece BPE model in Llama's
layout.

    make_tokenizer.py [OUTPUT]

``<unk> <s> </s>`` are 0 1 2, the 256 bytes follow, then merges and characters: 4,096 pieces, a multiple of
128, so that no padding is needed at TP 1 to 8. Characters beyond the coverage are spelt in bytes. Text comes
back as it went in.
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


def paragraphs() -> Iterator[str]:
    """All training text, Chinese and English."""
    for path in sorted(HERE.glob("*/*.train.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield from filter(None, json.loads(line)["text"].split("\n"))


def main(output: Path) -> None:
    """Train and write the model."""
    with output.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=paragraphs(),
            model_writer=model,
            model_type="bpe",
            vocab_size=PIECES,
            character_coverage=COVERAGE,
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


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(f"usage: {Path(sys.argv[0]).name} [OUTPUT]")
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else HERE / "tokenizer.model")
