#!/usr/bin/env python3
"""Turn instruction records into what finetune_sat.py trains on: token ids, and which of them are responses.

    tools/prepare_sft.py --input data/*.jsonl --output-prefix prepared/sft \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model model_folder

Records may be alpaca's, sharegpt's, messages, or prompts with responses (docs/sft.md). Input may be compressed
(.gz .xz .zst). Writes PREFIX.bin, .idx and PREFIX.json, which says whose tokens they are, by which template, and
what was left out. A run that was interrupted goes on where it stopped.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sat.data.encode import conditions
from megatron_sat.data.prepare import prepare_lines
from megatron_sat.data.sft_encode import TOO_LONG, ChatOptions, chat_job, told
from megatron_sat.data.sft_records import FORMS
from megatron_sat.data.sft_template import WRITTEN_HERE, build_template
from megatron_sat.data.tokenizer import KINDS, build_tokenizer
from megatron_sat.log import say


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="paths or globs of .jsonl, .jsonl.gz, .jsonl.xz, .jsonl.zst")
    add("--output-prefix", required=True, help="where the data set goes; folders are made")
    add("--tokenizer-type", required=True, help=f"one of {', '.join(KINDS)}")
    add("--tokenizer-model", required=True, help="a SentencePiece model or a Hugging Face folder, on this machine")
    add("--format", choices=("auto", *FORMS), default="auto", help="of the records (default: by their fields)")
    written = ", ".join(WRITTEN_HERE)
    add("--template", default="tokenizer", help=f"tokenizer (its chat template), {written}, or a file of a template")
    add("--prepend-bos", action="store_true", help=f"begin each example with the bos token ({written})")
    add("--max-tokens", type=int, help="of an example (default: any; finetune_sat.py cuts to its --seq-length)")
    add("--too-long", choices=TOO_LONG, help="what becomes of a longer one (default: truncate)")
    add("--keep", action="append", default=[], metavar="FIELD=VALUE", help="keep only such records; repeatable")
    add("--drop", action="append", default=[], metavar="FIELD=VALUE", help="leave such records out; repeatable")
    add("--skip-malformed", action="store_true", help="count unreadable lines instead of ending at the first")
    add("--overwrite", action="store_true", help="replace a data set made from other input or settings")
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, help="processes (default: this machine's cores)")
    return parser


def main(argv: Sequence[str]) -> None:
    """Prepare what the command line asks for, and say what came of it."""
    args = _parser().parse_args(argv)
    if args.too_long is not None and args.max_tokens is None:
        raise ValueError(f"--too-long {args.too_long} has no effect without --max-tokens; leave it out")
    tokenizer = build_tokenizer(args.tokenizer_type, model=args.tokenizer_model)
    options = ChatOptions(
        form=args.format,
        max_tokens=args.max_tokens,
        too_long=args.too_long or "truncate",
        keep=conditions(args.keep, flag="--keep"),
        drop=conditions(args.drop, flag="--drop"),
        skip_malformed=args.skip_malformed,
    )
    template = build_template(args.template, tokenizer=tokenizer, prepend_bos=args.prepend_bos)
    Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    side = prepare_lines(
        args.input,
        output_prefix=args.output_prefix,
        tokenizer=tokenizer,
        job=chat_job(options, template=template),
        workers=args.workers,
        overwrite=args.overwrite,
    )
    say(f"{args.output_prefix}: {told(side.totals)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError) as error:
        sys.exit(f"prepare_sft.py: {error}")
