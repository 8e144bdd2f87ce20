#!/usr/bin/env python3
"""Times whole training steps of the real program, dense and at several omission rates: forward, backward, optimizer.

    bench_step.py [--model llama-2-7b] [--layers 6] [--micro-batches 8] [--rates 0 1/2] [--out FILE]

One process, one device; the model, engine and layers are those that pretrain_sat.py builds. Text is random ids. Prints
a table and writes JSON: seconds (median), tokens/s, executed TFLOP/s, speed over dense, the bound that operations set,
peak memory. Ratios are of one run.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()

import torch

from megatron_sat import cli, distributed
from megatron_sat.build import Run, build_run, recompute_of
from megatron_sat.data.batch import build_train_iterator
from megatron_sat.data.encode import TextOptions
from megatron_sat.data.prepare import prepare
from megatron_sat.data.tokenizer import build_tokenizer
from megatron_sat.model.flops import kept_shape, step_flops, whole
from megatron_sat.sparsity.controller import Controller, sparse_modules
from megatron_sat.sparsity.schedule import ScheduleConfig, build_schedule

MODELS = {
    "tiny": "--hidden-size 128 --num-attention-heads 8 --ffn-hidden-size 352",
    "tinyllama-1.1b": (
        "--hidden-size 2048 --num-attention-heads 32 --group-query-attention --num-query-groups 4"
        " --ffn-hidden-size 5632"
    ),
    "llama-2-7b": "--hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11008",
    "llama-2-13b": "--hidden-size 5120 --num-attention-heads 40 --ffn-hidden-size 13824",
}
VOCABULARY = 32_000


def main() -> None:
    """Build once, then time each case on the same model."""
    args = arguments()
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        config = cli.parse(flags(args, data=random_text(Path(folder), args), cuda=cuda), world_size=1, cuda=cuda)
        distributed.join(distributed.read_launch(), backend=config.parallel.backend, timeout_minutes=10)
        run = build_run(config)
        cases = [(rate, weights) for rate in args.rates for weights in (args.weights if rate else args.weights[:1])]
        rows = [measure(run, rate=rate, weights=weights, steps=args.steps) for rate, weights in cases]
    dense = next(row for row in rows if row["rate"] == 0)
    for row in rows:
        row["speed"] = dense["seconds"] / row["seconds"]
        row["bound"] = dense["flops"] / row["flops"]
    report(rows, args=args)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rates", type=Fraction, nargs="+", default=[Fraction(0), Fraction(1, 2)])
    parser.add_argument("--weights", nargs="+", choices=("compact", "gather"), default=["compact", "gather"])
    parser.add_argument("--steps", type=int, default=5, help="timed steps a case, after two that are not")
    parser.add_argument("--flags", default="", help="more flags of pretrain_sat.py, in one string")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if 0 not in args.rates:
        parser.error("--rates must hold 0, the dense step that the others are compared with")
    return args


def random_text(folder: Path, args: argparse.Namespace) -> str:
    """A prepared data set of random ids, as long as one global batch needs."""
    generator = torch.Generator().manual_seed(1)
    length = args.seq_length + 1
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(args.micro_batch_size * args.micro_batches + 2):
            ids = torch.randint(0, VOCABULARY - 1, (length,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(map(str, ids))}) + "\n")
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=VOCABULARY)
    prefix, options = str(folder / "ids"), TextOptions(append_eod=True)
    prepare([str(folder / "text.jsonl")], output_prefix=prefix, tokenizer=tokenizer, options=options, workers=1)
    return prefix


def flags(args: argparse.Namespace, *, data: str, cuda: bool) -> list[str]:
    """The command line of pretrain_sat.py that this benchmark stands for."""
    batch = args.micro_batch_size * args.micro_batches
    steps = 10**3
    line = f"""
        {MODELS[args.model]} --num-layers {args.layers} --seq-length {args.seq_length}
        --max-position-embeddings {args.seq_length} --swiglu --normalization RMSNorm --disable-bias-linear
        --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
        --micro-batch-size {args.micro_batch_size} --global-batch-size {batch} --train-iters {steps} --lr 1e-6
        --lr-decay-style constant --num-workers 0 --tokenizer-type NullTokenizer --vocab-size {VOCABULARY}
        --train-data-path {data} --sat-schedule constant --sat-omission-rate 0.5 {"--bf16" if cuda else ""} {args.flags}
    """
    return line.split()


def measure(run: Run, *, rate: Fraction, weights: str, steps: int) -> dict[str, Any]:
    """Median seconds of a step at ``rate``, and what it computes."""
    training, selection = run.config.training, run.config.selection
    schedule = build_schedule(ScheduleConfig(kind="constant", omission_rate=rate, train_iters=training.train_iters))
    controller = Controller(sparse_modules(run.engine.chunks), schedule=schedule, interval=selection.selection_interval)
    count = training.num_micro_batches
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for step in range(1, steps + 3):
        assert run.datasets.train is not None
        reader = build_train_iterator(
            run.datasets.train,
            micro_batch_size=training.micro_batch_size,
            dp_rank=0,
            dp_size=1,
            consumed_samples=0,
            num_workers=0,
            device=run.device,
        )
        batches = list(islice(reader, count))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        clock = time.perf_counter()
        with controller.step(step, micro_batches=count if weights == "compact" else None):
            run.engine.train_step(iter(batches), num_micro_batches=count)  # its loss has waited for the device
        seconds.append(time.perf_counter() - clock)
    tokens = training.global_batch_size * run.config.model.seq_length
    kept = kept_shape(
        run.shape,
        rate,
        selection_groups=selection.selection_groups,
        channel_multiple=selection.channel_multiple,
        gqa=selection.gqa,
    )
    executed = step_flops(run.shape, kept, tokens=tokens, recompute=recompute_of(run.config))
    median = statistics.median(seconds[2:] or seconds)
    return {
        "rate": float(rate),
        "weights": weights if rate else "dense",
        "seconds": median,
        "spread": max(seconds[2:] or seconds) - min(seconds[2:] or seconds),
        "tokens_per_second": tokens / median,
        "flops": executed,
        "executed_tflops": executed / median / 1e12,
        "dense_flops": step_flops(run.shape, whole(run.shape), tokens=tokens),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


def report(rows: list[dict[str, Any]], *, args: argparse.Namespace) -> None:
    """The table on the console, and everything in the JSON file."""
    columns = ("rate", "weights", "ms/step", "tokens/s", "TFLOP/s", "speed", "bound", "peak GiB")
    log.table(
        f"{args.model}, {args.layers} layers, {args.micro_batches}x{args.micro_batch_size}x{args.seq_length} tokens",
        columns,
        [
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
        ],
    )
    if args.out is not None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        about = {"command": sys.argv, "torch": torch.__version__, "device": device}
        args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
