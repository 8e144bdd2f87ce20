#!/usr/bin/env python3
"""The loss of a trained model's first sparse step, before any training has mended it: what each way of choosing breaks.

    first_loss.py --hf FOLDER --text FILE.jsonl [--rates 1/4 1/2] [--modules all mlp] [--whole-ends 0 4] [--out FILE]

One window of text, forward only, on a CPU or a GPU, with transformers (`megatron_sat.hf`). A low loss here promises
nothing about the end of a run; one far above that of random choice says that a run begins by repairing the model.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()

import torch
from torch import Tensor
from torch.nn import Module

from benchmarks.program import device, write_json
from megatron_sat.checkpoint.hf_model import load_model
from megatron_sat.data.tokenizer import tokenizer_of_folder
from megatron_sat.evaluation.texts import Limits, read_texts
from megatron_sat.hf import sparsify
from megatron_sat.sparsity.importance import METRICS
from megatron_sat.sparsity.schedule import ScheduleConfig, build_schedule
from megatron_sat.sparsity.selector import SelectionConfig
from megatron_sat.sparsity.settings import MODULES


def main(argv: Sequence[str]) -> None:
    """Measure every combination on the same text."""
    args = arguments(argv)
    model = load_model(args.hf, dtype=torch.float32, device=device()).train()
    ids = window(args)
    dense = loss_of(model, ids)
    rows = [{**case, "loss": first_loss(model, ids, **case)} for case in cases(args)]
    title = f"{args.hf.name}: nats a token of the first sparse step on {ids.numel()} tokens; dense {dense:.3f}"
    columns = ("rate", "importance", "selection", "modules", "whole ends")
    cells = [(*(str(row[name.replace(" ", "_")]) for name in columns), f"{row['loss']:.3f}") for row in rows]
    log.table(title, (*columns, "loss"), cells)
    if args.out is not None:
        found = [{**row, "rate": str(row["rate"])} for row in rows]
        write_json(args.out, {"tokens": ids.numel(), "dense": dense, "rows": found})


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, required=True, help="folder of a transformers model with its tokenizer")
    parser.add_argument("--text", required=True, help="jsonl, also .gz .xz .zst, with a field text")
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--rates", type=Fraction, nargs="+", default=[Fraction(1, 4), Fraction(1, 2)])
    parser.add_argument("--importance", nargs="+", choices=tuple(METRICS), default=list(METRICS))
    parser.add_argument("--selection", nargs="+", choices=("sampling", "top-k"), default=["sampling", "top-k"])
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=["all"])
    parser.add_argument("--whole-ends", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    if any(not 0 < rate < 1 for rate in args.rates):
        parser.error("--rates must lie between 0 and 1; dense, rate 0, is always measured")
    return args


def window(args: argparse.Namespace) -> Tensor:
    """[1, tokens] ids: the text's documents, one after the other. Raises ValueError where they are too few."""
    found = read_texts({"text": [args.text]}, tokenizer=tokenizer_of_folder(args.hf), key="text", limits=Limits())
    ids = [token for document in found["text"].documents for token in document.tolist()]
    if len(ids) < args.tokens:
        raise ValueError(f"--text must have {args.tokens} tokens, it has {len(ids)}; give more text or fewer --tokens")
    return torch.tensor([ids[: args.tokens]], device=device())


def cases(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Every combination that differs from the others."""
    wanted = itertools.product(args.whole_ends, args.modules, args.rates, args.importance, args.selection)
    for ends, modules, rate, importance, selection in wanted:
        if importance != "uniform" or selection == "sampling":  # its scores are all alike
            yield {
                "rate": rate,
                "importance": importance,
                "selection": selection,
                "modules": modules,
                "whole_ends": ends,
            }


def first_loss(model: Module, ids: Tensor, *, rate: Fraction, **selection: Any) -> float:
    """Mean nats a token of step 1; the model is as it was afterwards."""
    schedule = build_schedule(ScheduleConfig(kind="constant", omission_rate=rate, train_iters=1))
    sparse = sparsify(model, schedule=schedule, selection=SelectionConfig(**selection))
    try:
        with sparse.step(1):
            return loss_of(model, ids)
    finally:
        sparse.remove()


@torch.no_grad()
def loss_of(model: Module, ids: Tensor) -> float:
    """Mean nats a token of one window."""
    return float(model(input_ids=ids, labels=ids).loss)


if __name__ == "__main__":
    main(sys.argv[1:])
