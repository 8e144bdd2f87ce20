"""Token ids of all text of a comparison, one process for all data sets: its start would take longer than its work.

    python -m megatron_sat.compare.prepare --tokenizer FOLDER_OR_FILE --output DIR NAME=FILE [NAME=FILE ...]

Files of one NAME make one data set, DIR/NAME; an interrupted run goes on where it was.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sat.data.encode import TextOptions
from megatron_sat.data.prepare import prepare
from megatron_sat.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_of_folder
from megatron_sat.log import say


def main(argv: Sequence[str]) -> None:
    """Prepare what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model, or a model's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("data", nargs="+", metavar="NAME=FILE", help="jsonl, plain, .gz, .xz or .zst")
    args = parser.parse_args(argv)
    tokenizer = _tokenizer(args.tokenizer)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, files in _named(args.data).items():
        prefix = f"{args.output / name}"
        side = prepare(
            files,
            output_prefix=prefix,
            tokenizer=tokenizer,
            options=TextOptions(key="text", append_eod=True),
            workers=min(4, len(os.sched_getaffinity(0))),
        )
        found = side.totals
        say(f"{prefix}: {found.documents:,} documents, {found.tokens:,} tokens, {found.characters:,} characters")


def _tokenizer(path: Path) -> Tokenizer:
    return build_tokenizer("SentencePieceTokenizer", model=str(path)) if path.is_file() else tokenizer_of_folder(path)


def _named(pairs: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise ValueError(f"text must be given as NAME=FILE, got {pair}; write for instance zh=zh.jsonl")
        found.setdefault(name, []).append(file)
    return found


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError) as error:
        sys.exit(f"prepare: {error}")
