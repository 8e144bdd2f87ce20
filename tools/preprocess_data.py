#!/usr/bin/env python3
"""Turn jsonl files into Megatron data sets: PREFIX_FIELD_document.bin, .idx and .json for each field.

Flags and output names are those of Megatron-LM's tool of this name. An interrupted run continues when started
again; nothing carries its final name before it is whole. Order is that of the input, whatever --workers is.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sat.data.encode import TextOptions, conditions
from megatron_sat.data.prepare import prepare
from megatron_sat.data.tokenizer import KINDS, build_tokenizer
from megatron_sat.log import say

_NEEDLESS = {
    "--partitions": "work is shared out line by line",
    "--keep-sequential-samples": "the order of the input is always kept",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="jsonl files and globs: plain, .gz, .xz or .zst")
    add(
        "--json-keys", nargs="+", default=["text"], help="fields to tokenise, a data set each (default: text)"
    )
    add("--output-prefix", required=True, help="where the data sets go; folders are made")
    add("--tokenizer-type", required=True, help=f"one of {', '.join(KINDS)}")
    add("--tokenizer-model", help="a SentencePiece model or a Hugging Face folder, on this machine")
    add("--vocab-size", type=int, help="of a NullTokenizer")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--prepend-bos", action="store_true", help="begin each document with the bos token")
    add(
        "--keep",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="keep only such records; repeatable",
    )
    add(
        "--drop",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="leave such records out; repeatable",
    )
    add("--skip-malformed", action="store_true", help="count unreadable lines instead of ending at the first")
    add("--overwrite", action="store_true", help="replace a data set made from other input or settings")
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: this machine's cores)",
    )
    add("--log-interval", type=int, default=100_000, help="documents between two lines of progress")
    add("--commit-interval", type=int, default=20_000, help="documents that an interruption may cost")
    for flag, reason in _NEEDLESS.items():
        add(flag, nargs="?", const=True, help=f"accepted without effect: {reason}")
    return parser


def main(argv: Sequence[str]) -> None:
    """Prepare what the command line asks for, and say what came of it."""
    args = _parser().parse_args(argv)
    for flag, reason in _NEEDLESS.items():
        if getattr(args, flag[2:].replace("-", "_")) is not None:
            say(f"{flag} has no effect: {reason}")
    tokenizer = build_tokenizer(args.tokenizer_type, model=args.tokenizer_model, vocab_size=args.vocab_size)
    if not args.append_eod:
        say("documents will run into each other: --append-eod separates them")
    Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    for key in args.json_keys:
        prefix = f"{args.output_prefix}_{key}_document"
        side = prepare(
            args.input,
            output_prefix=prefix,
            tokenizer=tokenizer,
            options=TextOptions(
                key=key,
                append_eod=args.append_eod,
                prepend_bos=args.prepend_bos,
                keep=conditions(args.keep, flag="--keep"),
                drop=conditions(args.drop, flag="--drop"),
                skip_malformed=args.skip_malformed,
            ),
            workers=args.workers,
            overwrite=args.overwrite,
            log_interval=args.log_interval,
            commit_interval=args.commit_interval,
        )
        count = side.totals
        say(
            f"{prefix}: {count.documents:,} documents, {count.tokens:,} tokens, {count.characters:,} "
            "characters, "
            f"{count.bytes:,} bytes; left out: {count.malformed:,} malformed, {count.filtered:,} filtered, "
            f"{count.empty:,} without text"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError) as error:
        sys.exit(f"preprocess_data.py: {error}")
