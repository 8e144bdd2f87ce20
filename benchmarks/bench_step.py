#!/usr/bin/env python3
"""Times whole training steps of the real program, dense and at several omission rates: forward, backward, optimizer.

    bench_step.py [--model llama-2-7b] [--layers 6] [--micro-batches 8] [--rates 0 1/2] [--twin] [--out FILE]

The model, engine and layers are those that pretrain_sat.py builds, on one device, or on the ranks of torchrun:
replicas, or with --tensor-parallel N ranks of one model (--flags=--sequence-parallel goes with it). Text is random ids.
Prints a table, writes JSON and a picture: seconds (median), tokens/s, executed TFLOP/s of a device, speed over dense,
the bound that operations set, peak memory. With --twin also the dense model in plain PyTorch (`twin`). Ratios are of
one run.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()

import torch

from benchmarks.layers import steps_at
from benchmarks.pictures import draw_step
from benchmarks.program import (
    CONSTANT,
    MODELS,
    Size,
    built,
    device,
    first_batches,
    flags,
    model_shape,
    parsed,
    random_text,
    write_json,
)
from benchmarks.twin import plain_training
from megatron_sat import distributed
from megatron_sat.build import Run, kept_of, recompute_of
from megatron_sat.model.flops import step_flops, whole

WARM_UP = 2
"""Steps before those that are timed."""
SUMS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: Sequence[str]) -> None:
    """Build once, then time each case on the same model; the twin first, and alone."""
    args, world = arguments(argv), distributed.read_launch().world_size
    size = Size(
        model=args.model,
        layers=args.layers,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        micro_batches=args.micro_batches,
        replicas=world // args.tensor_parallel,
    )
    with tempfile.TemporaryDirectory() as folder:
        data, cuda = random_text(Path(folder), size), torch.cuda.is_available()
        more = f"--tensor-model-parallel-size {args.tensor_parallel} {args.flags}"
        line = flags(size, data=data, cuda=cuda, steps=10**3, method=CONSTANT, more=more)
        twins = [measure_twin(line, size, sums=sums, steps=args.steps) for sums in args.twin]
        with built(line) as run:
            cases = [(rate, weights) for rate in args.rates for weights in (args.weights if rate else args.weights[:1])]
            rows = [measure(run, rate=rate, weights=weights, steps=args.steps) for rate, weights in cases]
    first = distributed.read_launch().rank == 0
    distributed.leave()
    rows += twins
    dense = next(row for row in rows if row["weights"] == "dense")
    for row in rows:
        row["speed"] = dense["seconds"] / row["seconds"]
        row["bound"] = dense["flops"] / row["flops"]
        row["executed_tflops"] /= world
    if first:
        report(rows, size=size, args=args)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=8, help="of a replica")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--rates", type=Fraction, nargs="+", default=[Fraction(0), Fraction(1, 2)])
    parser.add_argument("--weights", nargs="+", choices=("compact", "gather"), default=["compact", "gather"])
    parser.add_argument("--steps", type=int, default=5, help="timed steps a case, after two that are not")
    parser.add_argument("--flags", default="", help="more flags of pretrain_sat.py, in one string")
    parser.add_argument(
        "--twin", nargs="*", choices=tuple(SUMS), help="plain PyTorch too; what it adds gradients up in (default: fp32)"
    )
    parser.add_argument("--out", type=Path, help="JSON file; the picture lies beside it")
    args = parser.parse_args(argv)
    if 0 not in args.rates:
        parser.error("--rates must hold 0, the dense step that the others are compared with")
    world = distributed.read_launch().world_size
    if args.tensor_parallel < 1 or world % args.tensor_parallel:
        parser.error(f"--tensor-parallel must divide the ranks ({world}), got {args.tensor_parallel}")
    if args.twin is not None and world > 1:
        parser.error(f"--twin is of one process, got {world} ranks; leave it out")
    args.twin = [] if args.twin is None else args.twin or ["fp32"]
    return args


def measure(run: Run, *, rate: Fraction, weights: str, steps: int) -> dict[str, Any]:
    """Median seconds of a step at ``rate``, and what it computes."""
    training = run.config.training
    count = training.num_micro_batches
    opened = steps_at(run, rate=rate, micro_batches=count if weights == "compact" else None)
    batches = first_batches(run, count)

    def take(step: int) -> None:
        with opened(step):
            run.engine.train_step(iter(batches), num_micro_batches=count)  # its loss has waited for the device

    kept = kept_of(run.config, shape=run.shape, rate=rate)
    tokens = training.global_batch_size * run.config.model.seq_length
    executed = step_flops(run.shape, kept, tokens=tokens, recompute=recompute_of(run.config))
    return {
        "rate": float(rate),
        "weights": weights if rate else "dense",
        **timed(take, steps=steps, tokens=tokens, executed=executed),
        "dense_flops": step_flops(run.shape, whole(run.shape), tokens=tokens),
    }


def measure_twin(argv: list[str], size: Size, *, sums: str, steps: int) -> dict[str, Any]:
    """The same for plain PyTorch. Nothing of it is left afterwards, for the program's model is as large."""
    row = _twin_row(argv, size, sums=sums, steps=steps)
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def _twin_row(argv: list[str], size: Size, *, sums: str, steps: int) -> dict[str, Any]:
    config = parsed(argv)
    shape = model_shape(config, vocabulary=size.vocabulary)
    twin = plain_training(shape, config.settings, sums=SUMS[sums], device=device())
    ids = torch.randint(0, size.vocabulary, (size.micro_batches, size.micro_batch_size, size.seq_length + 1))
    batches = [{"tokens": each[:, :-1], "labels": each[:, 1:]} for each in ids.to(device())]
    flops = step_flops(shape, whole(shape), tokens=size.tokens)
    figures = timed(lambda _: twin.step(batches), steps=steps, tokens=size.tokens, executed=flops)
    return {"rate": 0.0, "weights": f"plain, {sums}", **figures, "dense_flops": flops}


def timed(take: Callable[[int], object], *, steps: int, tokens: int, executed: int) -> dict[str, Any]:
    """Take so many steps, and some before that. Each must have waited for the device when it returns."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for step in range(1, steps + WARM_UP + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        clock = time.perf_counter()
        take(step)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - clock)
    seconds = seconds[WARM_UP:]
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "spread": max(seconds) - min(seconds),
        "tokens_per_second": tokens / median,
        "flops": executed,
        "executed_tflops": executed / median / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


def report(rows: list[dict[str, Any]], *, size: Size, args: argparse.Namespace) -> None:
    """The table on the console; everything in the JSON file, and a picture of it."""
    columns = ("rate", "weights", "ms/step", "tokens/s", "TFLOP/s", "speed", "bound", "peak GiB")
    cells = [
        (
            row["rate"],
            row["weights"],
            round(1e3 * row["seconds"], 1),
            round(row["tokens_per_second"]),
            round(row["executed_tflops"], 1),
            round(row["speed"], 3),
            round(row["bound"], 3),
            round(row["peak_gib"] or 0, 2),
        )
        for row in rows
    ]
    log.table(str(size), columns, cells)
    if args.out is not None:
        ran = {"size": vars(size), "tensor_parallel": args.tensor_parallel, "flags": args.flags}
        write_json(args.out, {**ran, "rows": rows})
        draw_step(rows, args.out.with_suffix(".png"), title=str(size))


if __name__ == "__main__":
    main(sys.argv[1:])
