#!/usr/bin/env python3
"""Where a step's time goes on the GPU, dense and sparse, kernel by kernel; and what it could be at best.

    profile_step.py [--model llama-2-7b] [--layers 12] [--micro-batches 8] [--rate 1/2] [--out FILE]

One profiled step of each kind, of the real program with --layer-graphs. What the graphs launch is the layers' work (and
choosing); everything else lies outside of them: embedding, head, loss, optimizer, packing. Prints the kinds of work
side by side and the longest kernels, writes JSON.

The bound is Amdahl's, from the dense step's own kernels: products, attention, rotation and gating of the layers shrink
with the rate, norms, residuals and all that lies outside do not.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()

import torch

from benchmarks.layers import steps_at
from benchmarks.program import CONSTANT, MODELS, Size, built, first_batches, flags, random_text, write_json
from megatron_sat import distributed
from megatron_sat.build import Run, kept_of
from megatron_sat.model.flops import step_flops, whole

KINDS: dict[str, tuple[str, ...]] = {
    "products": ("nvjet", "gemm", "cutlass", "splitk", "cublas"),
    "attention": ("sdpa", "flash", "fmha", "compute_dot_do_o"),
    "rotation and gating": ("silu", "sigmoid", "cat_mul", "CatArray"),
    "norms": ("rsqrt", "layer_norm", "rms_norm", "GammaBeta", "mean"),
    "optimizer": ("multi_tensor_apply", "adam"),
    "cross entropy": ("exp", "log", "softmax", "max"),
    "copies": ("memcpy", "memset", "copy", "fill"),
    "indices": ("index", "sort", "gather", "scatter"),
}
"""Kinds of kernels by what their names hold, in lower case; the first that fits. The rest are element by element."""
REST = "element by element"
SHRINK = ("products", "attention", "rotation and gating")
"""Kinds that work on heads and channels, where they lie inside layers."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One kernel's launch."""

    name: str
    seconds: float
    start: float
    in_graph: bool

    @property
    def kind(self) -> str:
        name = self.name.lower()
        return next((kind for kind, parts in KINDS.items() if any(part.lower() in name for part in parts)), REST)


def main(argv: Sequence[str]) -> None:
    """Profile a dense step and a sparse one of the same run."""
    args = arguments(argv)
    size = Size(
        model=args.model,
        layers=args.layers,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        micro_batches=args.micro_batches,
    )
    with tempfile.TemporaryDirectory() as folder:
        data = random_text(Path(folder), size)
        line = flags(size, data=data, cuda=True, steps=10**3, method=CONSTANT, more=f"--layer-graphs {args.flags}")
        with built(line) as run:
            found = {str(rate): profiled(run, rate=rate, folder=Path(folder)) for rate in (Fraction(0), args.rate)}
            share = layers_share(run, args.rate)
    distributed.leave()
    report(found, size=size, share=share, out=args.out)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rate", type=Fraction, default=Fraction(1, 2))
    parser.add_argument("--flags", default="", help="more flags of pretrain_sat.py, in one string")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    if not 0 < args.rate < 1:
        parser.error(f"--rate must lie between 0 and 1, got {args.rate}; the dense step is profiled anyway")
    if not torch.cuda.is_available():
        parser.error("a GPU must be there, found none; bench_step.py runs anywhere")
    return args


def layers_share(run: Run, rate: Fraction) -> float:
    """Of the layers' operations, what a sparse step keeps."""
    tokens = run.config.model.seq_length
    kept = kept_of(run.config, shape=run.shape, rate=rate)
    dense, sparse = (step_flops(run.shape, part, tokens=tokens) for part in (whole(run.shape), kept))
    head = 6 * tokens * run.shape.hidden_size * run.shape.padded_vocab_size
    return (sparse - head) / (dense - head)


def profiled(run: Run, *, rate: Fraction, folder: Path, warm_up: int = 3) -> list[Work]:
    """The launches of one step, after some that compile and record."""
    training = run.config.training
    count = training.num_micro_batches
    batches = first_batches(run, count)
    opened = steps_at(run, rate=rate, micro_batches=count)

    def take(step: int) -> None:
        with opened(step):
            run.engine.train_step(iter(batches), num_micro_batches=count)

    for step in range(1, warm_up + 1):
        take(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        take(warm_up + 1)
        torch.cuda.synchronize()
    trace = folder / "trace.json"
    profile.export_chrome_trace(str(trace))
    return launches(json.loads(trace.read_text())["traceEvents"])


def launches(events: Sequence[dict[str, Any]]) -> list[Work]:
    """The device's work in a trace. What a graph launched carries the number of the host's call that launched it."""
    calls = {event["args"]["correlation"] for event in events if event.get("name") == "cudaGraphLaunch"}
    return [
        Work(
            name=event["name"],
            seconds=1e-6 * event["dur"],
            start=1e-6 * event["ts"],
            in_graph=event["args"].get("correlation") in calls,
        )
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def by_kind(work: Iterable[Work]) -> dict[str, float]:
    """Seconds by place and kind."""
    found = defaultdict[str, float](float)
    for one in work:
        found[f"{'layers' if one.in_graph else 'outside'}: {one.kind}"] += one.seconds
    return dict(found)


def idle_seconds(work: Sequence[Work]) -> float:
    """Between the first launch and the last, how long the device had nothing to do."""
    idle, end = 0.0, None
    for one in sorted(work, key=lambda each: each.start):
        idle += 0.0 if end is None else max(one.start - end, 0.0)
        end = max(end or 0.0, one.start + one.seconds)
    return idle


def amdahl(dense: dict[str, float], *, share: float) -> float:
    """How many times as fast a step can be whose shrinking work takes ``share`` of its time."""
    total = sum(dense.values())
    shrinks = sum(dense.get(f"layers: {kind}", 0.0) for kind in SHRINK)
    return total / (total - shrinks * (1 - share))


def report(found: dict[str, list[Work]], *, size: Size, share: float, out: Path | None) -> None:
    """Two tables and a file."""
    kinds = {rate: by_kind(work) for rate, work in found.items()}
    rates = list(found)
    dense, sparse = (kinds[rate] for rate in rates)
    names = sorted(dense.keys() | sparse.keys(), key=lambda name: -dense.get(name, 0.0))
    rows = [(name, *(round(1e3 * kinds[rate].get(name, 0.0), 2) for rate in rates)) for name in names]
    rows.append(("all kernels", *(round(1e3 * sum(kinds[rate].values()), 2) for rate in rates)))
    rows.append(("device idle", *(round(1e3 * idle_seconds(found[rate]), 2) for rate in rates)))
    log.table(f"{size}: ms of a step", ("work", *(f"rate {rate}" for rate in rates)), rows)
    bound, reached = amdahl(dense, share=share), sum(dense.values()) / sum(sparse.values())
    log.say(f"kernels alone: {reached:.3f} times as fast; bound {bound:.3f}; reached {reached / bound:.1%} of it")
    longest = {rate: longest_kernels(work) for rate, work in found.items()}
    for rate in rates:
        cells = [(round(1e3 * s, 2), count, name[:90]) for name, s, count in longest[rate][:12]]
        log.table(f"rate {rate}: the longest kernels", ("ms", "launches", "kernel"), cells)
    if out is not None:
        result = {"size": vars(size), "kept_share": share, "bound": bound, "speed": reached}
        idle = {rate: idle_seconds(work) for rate, work in found.items()}
        write_json(out, {**result, "seconds": kinds, "idle_seconds": idle, "longest": longest})


def longest_kernels(work: Iterable[Work]) -> list[tuple[str, float, int]]:
    """(name, seconds, launches), most seconds first; forty of them."""
    seconds, counts = defaultdict[str, float](float), defaultdict[str, int](int)
    for one in work:
        seconds[one.name] += one.seconds
        counts[one.name] += 1
    return [(name, seconds[name], counts[name]) for name in sorted(seconds, key=lambda name: -seconds[name])[:40]]


if __name__ == "__main__":
    main(sys.argv[1:])
