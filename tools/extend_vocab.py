#!/usr/bin/env python3
"""Give a tokenizer N Chinese pieces more, prove that nothing else changed, and resize its model.

Writes one folder: tokenizer.model (SentencePiece), tokenizer.json, tokenizer_config.json, the model with its new rows,
config.json and a report. It appears whole or not at all; a proof that fails ends the run.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sat.data.jsonl import Lines, find_inputs
from megatron_sat.log import say
from megatron_sat.vocab.embeddings import INITS
from megatron_sat.vocab.job import ModelSettings, extend_vocabulary

HOLD_OUT_EVERY = 50
"""Without --held-out every such document of --text is kept from the trainer."""
HELD_OUT_CHARACTERS = 500_000
"""Characters of a domain that proofs and fertility look at."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="a SentencePiece BPE model, or a Hugging Face folder")
    add("--text", nargs="+", required=True, help="jsonl files and globs to find pieces in: plain, .gz, .xz or .zst")
    add("--held-out", nargs="+", help=f"for the proofs (default: every {HOLD_OUT_EVERY}th document of --text)")
    add("--json-key", default="text", help="the field that holds the text (default: text)")
    add("--add", type=int, required=True, help="new pieces, exactly (the paper: 33000)")
    add("--output", required=True, help="the folder to write; it must not exist")
    add("--sentencepiece-model", help="take the pieces of this BPE model instead of training one")
    add(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="part of the Chinese text whose characters get a piece (default: 0.9995)",
    )
    add("--model", help="a Hugging Face folder with safetensors, to be resized (default: the tokenizer alone)")
    defaults = ModelSettings(folder=Path())
    add("--init", choices=INITS, default=defaults.init, help=f"how new rows begin (default: {defaults.init})")
    add(
        "--match-norms",
        action=argparse.BooleanOptionalAction,
        default=defaults.match_norms,
        help=f"new rows get the norm of those they are made from (default: {defaults.match_norms})",
    )
    add("--pad-to", type=int, default=defaults.pad_to, help="rows are a multiple of this times TP (default: 128)")
    add("--tensor-model-parallel-size", type=int, default=1, help="TP size that the rows are padded for (default: 1)")
    add("--seed", type=int, default=defaults.seed, help="of the inits that draw")
    add("--loss-characters", type=int, default=defaults.loss_characters, help="held-out Chinese to measure the loss on")
    add(
        "--max-loss-increase",
        type=float,
        default=defaults.max_loss_increase,
        help=f"nats a character that the loss may rise by (default: {defaults.max_loss_increase})",
    )
    return parser


def texts_of(files: Iterable[Path], *, key: str) -> Iterator[tuple[str, str]]:
    """(domain, text) of each record; the domain is its field "lang" and "domain", or the file's name."""
    for path in files:
        for number, line in enumerate(Lines(path), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                text = record[key]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} must be a JSON object with the field {key!r}, it is not ({error}); set --json-key"
                ) from error
            fields = [str(record[name]) for name in ("lang", "domain") if record.get(name)]
            yield "/".join(fields) or path.name.split(".")[0], text


def main(argv: Sequence[str]) -> None:
    """Extend what the command line names."""
    args = _parser().parse_args(argv)
    files = find_inputs(args.text)
    apart = args.held_out is None

    def documents() -> Iterator[str]:
        for order, (_, text) in enumerate(texts_of(files, key=args.json_key)):
            if not apart or order % HOLD_OUT_EVERY:
                yield text

    held_out: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    others = texts_of(files if apart else find_inputs(args.held_out), key=args.json_key)
    for order, (domain, text) in enumerate(others):
        if (not apart or order % HOLD_OUT_EVERY == 0) and sizes.get(domain, 0) < HELD_OUT_CHARACTERS:
            held_out.setdefault(domain, []).append(text)
            sizes[domain] = sizes.get(domain, 0) + len(text)
    model = None
    if args.model is None:
        say("no --model was given: the tokenizer alone is extended, and its model will not fit it")
    else:
        model = ModelSettings(
            folder=Path(args.model),
            init=args.init,
            match_norms=args.match_norms,
            pad_to=args.pad_to,
            tensor_parallel=args.tensor_model_parallel_size,
            seed=args.seed,
            loss_characters=args.loss_characters,
            max_loss_increase=args.max_loss_increase,
        )
    extend_vocabulary(
        args.tokenizer,
        add=args.add,
        output=args.output,
        documents=documents,
        held_out=held_out,
        ready_model=args.sentencepiece_model,
        coverage=args.character_coverage,
        model=model,
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"extend_vocab.py: {error}")
