#!/usr/bin/env python3
"""Times one layer of the program, dense and sparse, beside a layer of plain PyTorch; and what a device does in general.

    bench_layer.py [--models llama-2-7b ...] [--tokens 4096 16384] [--rates 1/4 1/2 3/4 24/25] [--out FILE]

"layer" is the forward and backward of one micro-batch, weights' gradients included; "once a step" is choosing, packing
and unpacking. Both are the device's time alone, with the host's launches hidden; "launched" is the layer as the host
launches it, kernel by kernel. `gather` cuts weights in every micro-batch. Prints a table, writes JSON and a picture.

Unless --no-hardware, it also measures what such layers are made of, shape by shape, and writes what tools/plan.py
predicts from: benchmarks/results/gemm-<device>.json.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()

import torch

from benchmarks.layers import LEAST, clear_gradients, program_layer, steps_at, time_layer
from benchmarks.pictures import draw_layers
from benchmarks.program import (
    CONSTANT,
    MODELS,
    ROOT,
    VOCABULARY,
    Size,
    about,
    built,
    device_name,
    flags,
    random_text,
    write_json,
)
from benchmarks.rates import (
    Outside,
    Sizes,
    choosing_rows,
    collectives_in,
    measure_attention,
    measure_bytes_per_second,
    measure_outside,
    measure_products,
    wanted_attention,
    wanted_products,
)
from benchmarks.twin import plain_layer
from megatron_sat import distributed
from megatron_sat.build import Run, kept_of
from megatron_sat.estimate.hardware import Hardware, save, slug
from megatron_sat.model.flops import layer_forward_flops, whole
from megatron_sat.rehearsal.memory import layer_matrices

LADDER = tuple(Fraction(rate) for rate in ("1/10", "1/5", "1/4", "3/10", "2/5", "1/2", "3/4", "24/25"))
"""Rates whose shapes go into the hardware's file: those of the paper's two schedules, and some between."""


@dataclass(kw_only=True)
class Measured:
    """What the models have given so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    outside: list[Outside] = field(default_factory=list)
    products: set[Sizes] = field(default_factory=set)
    """Shapes that the hardware's file is to hold."""
    attention: set[Sizes] = field(default_factory=set)


def main(argv: Sequence[str]) -> None:
    """A model after the other, then the shapes of all."""
    args, measured = arguments(argv), Measured()
    for model in args.models:
        measure_model(model, measured, args=args)
        keep(measured.rows, args=args)  # whatever happens to the next model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    distributed.leave()
    if args.hardware is not None:
        hardware = describe_hardware(measured, before=args.hardware)
        save(hardware, args.hardware)
        log.say(f"{len(hardware.products)} products, {len(hardware.attention)} attentions: {args.hardware}")


def measure_model(model: str, measured: Measured, *, args: argparse.Namespace) -> None:
    """Its layer at every micro-batch and rate; and, for the hardware's file, what is outside of it."""
    size = Size(
        model=model,
        layers=1,
        seq_length=args.seq_length,
        micro_batch_size=1,
        micro_batches=args.micro_batches,
        vocabulary=args.vocabulary,
    )
    with tempfile.TemporaryDirectory() as folder:
        data, cuda = random_text(Path(folder), size), torch.cuda.is_available()
        with built(flags(size, data=data, cuda=cuda, steps=10**3, method=CONSTANT, more=args.flags)) as run:
            rows = [row for tokens in args.tokens for row in measure(run, model=model, tokens=tokens, args=args)]
            measured.rows += rows
            report(rows)
            if args.hardware is None:
                return
            dense = min((row for row in rows if row["weights"] == "dense"), key=lambda row: row["tokens"])
            seconds = dense["layer_seconds"] * args.seq_length / dense["tokens"]
            measured.outside.append(measure_outside(run, layer_seconds=seconds, dtype=dtype_here(), repeats=args.steps))
            kept = [whole(run.shape), *(kept_of(run.config, shape=run.shape, rate=rate) for rate in LADDER)]
            measured.products |= set(wanted_products(run.shape, kept, tokens=args.tokens))
            measured.attention |= set(wanted_attention(run.shape, kept, tokens=args.tokens))


def describe_hardware(measured: Measured, *, before: Path) -> Hardware:
    """Measure the shapes that the models have, and put everything together. before: the device's table until now, whose
    collectives stay."""
    rows, dtype = measured.rows, dtype_here()
    largest = max(measured.outside, key=lambda each: each.tokens * each.hidden_size)  # the least bound by launches
    return Hardware(
        name=device_name(),
        products=tuple(measure_products(measured.products, dtype=dtype)),
        attention=tuple(measure_attention(measured.attention, dtype=dtype)),
        choosing=tuple(choosing_rows(rows)),
        bytes_per_second=measure_bytes_per_second(dtype=dtype),
        loss_seconds_per_logit=largest.per_logit,
        update_seconds_per_parameter=largest.per_parameter,
        launch_seconds=launch_seconds(rows),
        about=about(),
        **collectives_in(before, device=device_name()),
    )


def launch_seconds(rows: list[dict[str, Any]]) -> float:
    """What the host needs to ask for a packed layer; nothing where the host is the device."""
    found = [row["host_seconds"] for row in rows if row["weights"] == "compact"]
    return min(found) if torch.cuda.is_available() else 0.0


def dtype_here() -> torch.dtype:
    """In which the model computes: bf16 on a GPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Without a GPU the defaults are of a size that a CPU can do."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ["llama-2-7b", "llama-2-13b", "tinyllama-1.1b"] if cuda else ["tiny"]
    parser.add_argument("--models", choices=tuple(MODELS), nargs="+", default=models)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384] if cuda else [256])
    parser.add_argument("--seq-length", type=int, default=4096 if cuda else 128, help="tokens come in such sequences")
    parser.add_argument("--rates", type=Fraction, nargs="+", default=list(map(Fraction, (".25", ".5", ".75", ".96"))))
    parser.add_argument("--weights", nargs="+", choices=("compact", "gather"), default=["compact", "gather"])
    parser.add_argument("--micro-batches", type=int, default=LEAST, help=f"of a step, at least {LEAST}")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a case, twice")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="of the one-layer model")
    parser.add_argument("--flags", default="", help="more flags of pretrain_sat.py, in one string")
    parser.add_argument("--out", type=Path, help="JSON file; the picture lies beside it")
    results = ROOT / "benchmarks" / "results" / f"gemm-{slug(device_name())}.json"
    parser.add_argument("--hardware", type=Path, default=results, help="what tools/plan.py reads")
    parser.add_argument("--no-hardware", action="store_const", const=None, dest="hardware", help="layers alone")
    args = parser.parse_args(argv)
    if args.micro_batches < LEAST:
        parser.error(f"--micro-batches must be at least {LEAST}, got {args.micro_batches}: laps between first and last")
    if "compact" not in args.weights and args.hardware is not None:
        parser.error("--weights must hold compact, whose choosing the hardware's file needs; or add --no-hardware")
    if "--layer-graphs" in args.flags and args.hardware is not None:
        launches = "--flags must be without --layer-graphs for the hardware's file: it holds launches"
        parser.error(f"{launches}; add --no-hardware")
    for tokens in args.tokens:
        if tokens % args.seq_length:
            parser.error(f"--tokens must be multiples of --seq-length ({args.seq_length}), got {tokens}")
    return args


def measure(run: Run, *, model: str, tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of one model and micro-batch; ``speed`` is over the program's dense layer."""
    shape, sequences = run.shape, tokens // args.seq_length
    dtype = next(run.engine.chunks[0].parameters()).dtype
    layer = program_layer(run)
    batch = torch.randn(args.seq_length, sequences, shape.hidden_size, device=run.device).to(dtype).requires_grad_()
    rows = []
    for rate, weights in [(Fraction(0), "dense"), *((rate, w) for rate in args.rates for w in args.weights)]:
        found = time_layer(
            layer,
            inputs=batch,
            steps=args.steps,
            micro_batches=args.micro_batches,
            opened=steps_at(run, rate=rate, micro_batches=None if weights == "gather" else args.micro_batches),
            before=lambda: clear_gradients(run),
        )
        kept = kept_of(run.config, shape=run.shape, rate=rate)
        rows.append({"rate": float(rate), "weights": weights, "kept": kept, **asdict(found)})
    plain = plain_layer(shape, dtype=dtype, device=run.device)
    turned = batch.detach().transpose(0, 1).contiguous().requires_grad_()
    found = time_layer(plain, inputs=turned, steps=args.steps, micro_batches=args.micro_batches)
    rows.append({"rate": 0.0, "weights": "plain", "kept": whole(shape), **asdict(found)})
    dense = rows[0]
    flops = {id(row): 3 * tokens * sum(layer_forward_flops(shape, row["kept"]).values()) for row in rows}
    for row in rows:
        row |= {
            "model": model,
            "tokens": tokens,
            "tflops": flops[id(row)] / row["layer_seconds"] / 1e12,
            "speed": dense["layer_seconds"] / row["layer_seconds"],
            "bound": flops[id(dense)] / flops[id(row)],
            "entries": layer_matrices(shape, whole(shape), tensor=1),
            "kept_entries": layer_matrices(shape, row["kept"], tensor=1),
            "kept": asdict(row["kept"]),
        }
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """A table a model and micro-batch on the console."""
    columns = ("rate", "weights", "layer, ms", "TFLOP/s", "speed", "bound", "once, ms", "launched")
    for (model, tokens), group in groupby(rows, key=lambda row: (row["model"], row["tokens"])):
        cells = [
            (
                row["rate"],
                row["weights"],
                round(1e3 * row["layer_seconds"], 3),
                round(row["tflops"], 1),
                round(row["speed"], 3),
                round(row["bound"], 3),
                round(1e3 * row["step_seconds"], 3),
                round(1e3 * row["layer_seconds_launched"], 3),
            )
            for row in group
        ]
        log.table(f"one layer of {model}, {tokens} tokens, forward and backward", columns, cells)


def keep(rows: list[dict[str, Any]], *, args: argparse.Namespace) -> None:
    """Everything in the JSON file, and a picture of it."""
    if args.out is not None:
        write_json(args.out, {"sequence": args.seq_length, "flags": args.flags, "rows": rows})
        draw_layers(rows, args.out.with_suffix(".png"), title=f"One layer on {device_name()}")


if __name__ == "__main__":
    main(sys.argv[1:])
