#!/usr/bin/env python3
"""Times whole runs of the real program: the paper's ladders, fewer steps of them, beside the dense run of as many.

    bench_ladder.py [--model llama-2-7b] [--layers 12] [--ladders cpt=60 sft=40] [--out FILE]

Each run is a process of pretrain_sat.py that logs every step. "measured" is what those steps took, the first ones and
every change of rung included, the process's start-up not. "the paper's length" is computed: the steady seconds of each
rung times the paper's steps, plus once what the measured steps took beyond steady ones. A rung too short here to tell
its steady seconds takes them from its neighbours, in proportion to operations.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()

import torch

from benchmarks.ladders import LADDERS, Train, compare, run_program
from benchmarks.pictures import draw_ladder
from benchmarks.program import CONSTANT, MODELS, VOCABULARY, Size, flags, model_shape, parsed, random_text, write_json


def main(argv: Sequence[str], *, train: Train = run_program) -> None:
    """The dense run once, as long as the longest ladder, then each ladder. train: runs the program to its end."""
    args = arguments(argv)
    size = Size(
        model=args.model,
        layers=args.layers,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        micro_batches=args.micro_batches,
        vocabulary=args.vocabulary,
    )
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = random_text(folder, size)

        def line(steps: int, method: str) -> list[str]:
            return flags(size, data=data, cuda=cuda, steps=steps, method=method, more=args.flags)

        config = parsed(line(max(args.ladders.values()), CONSTANT))
        shape = model_shape(config, vocabulary=size.vocabulary)
        dense = train(line(max(args.ladders.values()), "--sat-schedule none"), log=folder / "dense.jsonl")
        runs, found = {"dense": dense}, []
        for name, steps in args.ladders.items():
            ladder = LADDERS[name]
            runs[name] = train(line(steps, ladder.flags(steps)), log=folder / f"{name}.jsonl")
            row = compare(ladder, steps=steps, dense=dense, sparse=runs[name], shape=shape, config=config)
            found.append({"ladder": name, **row})
            keep(found, runs, size=size, args=args)  # what is measured stays, whatever happens to the next one
    report(found, size=size)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Without a GPU the defaults are of a size that a CPU can do."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-2-7b" if cuda else "tiny")
    parser.add_argument("--layers", type=int, default=12 if cuda else 2)
    parser.add_argument("--seq-length", type=int, default=4096 if cuda else 128)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=8 if cuda else 2)
    parser.add_argument(
        "--ladders", nargs="+", default=["cpt=60", "sft=40"], help=f"NAME=STEPS, of {', '.join(LADDERS)}"
    )
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--flags", default="", help="more flags of pretrain_sat.py, in one string")
    parser.add_argument("--out", type=Path, help="JSON file; the picture lies beside it")
    args = parser.parse_args(argv)
    try:
        args.ladders = dict(_ladder(written) for written in args.ladders)
    except ValueError as error:
        parser.error(str(error))
    return args


def _ladder(written: str) -> tuple[str, int]:
    name, _, steps = written.partition("=")
    if name not in LADDERS or not steps.isdigit():
        raise ValueError(f"--ladders must be NAME=STEPS, of {', '.join(LADDERS)}, got {written}; try cpt=60")
    LADDERS[name].start(int(steps))
    return name, int(steps)


def report(found: list[dict[str, Any]], *, size: Size) -> None:
    """The table on the console, and what it rests on."""
    columns = ("ladder", "steps", "dense, s", "sparse, s", "saved", "bound", "the paper's steps", "saved", "bound")
    cells = [
        (
            row["ladder"],
            row["steps"],
            round(row["dense_seconds"], 2),
            round(row["sparse_seconds"], 2),
            f"{row['saved']:.1%}",
            f"{row['bound']:.1%}",
            row["paper_steps"],
            f"{row['paper_saved']:.1%}",
            f"{row['paper_bound']:.1%}",
        )
        for row in found
    ]
    log.table(f"{size}: measured, and computed for the paper's length", columns, cells)
    for row in found:
        for remark in row["remarks"]:
            log.say(f"{row['ladder']}: {remark}")


def keep(
    found: list[dict[str, Any]], runs: dict[str, list[dict[str, Any]]], *, size: Size, args: argparse.Namespace
) -> None:
    """Everything in the JSON file, and a picture of it."""
    if args.out is not None:
        write_json(args.out, {"size": vars(size), "flags": args.flags, "rows": found, "runs": runs})
        seconds = {name: [record["step_seconds"] for record in records] for name, records in runs.items()}
        draw_ladder(seconds, args.out.with_suffix(".png"), title=str(size))


if __name__ == "__main__":
    main(sys.argv[1:])
