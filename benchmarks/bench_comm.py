#!/usr/bin/env python3
"""Times the reduction of one step's gradients between replicas: all of them, and what is kept alone.

    torchrun --nproc-per-node 2 benchmarks/bench_comm.py [--model llama-2-7b] [--layers 4] [--rates 1/2] [--out FILE]

Through NCCL on GPUs, through gloo on a CPU. The model is one of known widths with next to no vocabulary, so that what
is reduced is the layers' weights, in megatron.core's DDP: all-reduced, and sharded as for a distributed optimizer;
all at once after the backward, and bucket by bucket as where both overlap (here without a backward beside it).
Neurons are chosen at random. Prints a table and writes JSON and a picture: bytes that a rank hands to collectives,
milliseconds (median, of the slowest rank), how far the sums are from those of the full reduction.

Full reductions inside one host also go into what tools/plan.py predicts from, benchmarks/results/gemm-<device>.json,
where bench_layer.py has left that; --no-hardware leaves it as it is.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from benchmarks.pictures import draw_reduction
from benchmarks.program import MODELS, ROOT, Size, about, device_name, flags, write_json
from benchmarks.rates import add_collectives
from benchmarks.wire import counted
from megatron_sat import cli, distributed, faults
from megatron_sat.config import Config
from megatron_sat.engines.ddp import wrap_chunks
from megatron_sat.engines.sparse_reduce import SparseReduction
from megatron_sat.estimate.hardware import slug
from megatron_sat.layers import fused
from megatron_sat.layers.attach import attach_selectors
from megatron_sat.model.builder import build_chunks, embedding_of
from megatron_sat.sparsity.controller import Controller, sparse_modules

WARM_UP = 3
"""Reductions before those that are timed."""
VOCABULARY = 128
METHOD = (
    "--sat-schedule constant --sat-omission-rate 0.5 --sat-importance uniform --sat-selection sampling"
    " --sat-selection-interval 1"
)
"""Uniform: a step's choice is there without a forward."""
CASES = (("all-reduce", False), ("all-reduce", True), ("sharded", False), ("sharded", True))
"""(reduction, bucket by bucket)."""


def main(argv: Sequence[str]) -> None:
    """Each case on a model of its own."""
    args = arguments(argv)
    cuda, launch = torch.cuda.is_available(), distributed.read_launch()
    if not dist.is_initialized():
        distributed.join(launch, backend="nccl" if cuda else "gloo", timeout_minutes=5)
    ranks = dist.get_world_size()
    if ranks == 1:
        raise SystemExit("error: one rank has nobody to send to; start at least two with torchrun --nproc-per-node 2")
    faults.apply_all()
    fused.install()
    size = Size(
        model=args.model or ("llama-2-7b" if cuda else "tiny"),
        layers=args.layers,
        seq_length=32,
        micro_batch_size=1,
        micro_batches=ranks,
        vocabulary=VOCABULARY,
    )
    line = flags(size, data="none", cuda=cuda, steps=1, method=METHOD, more=args.flags)
    config = cli.parse(line, world_size=ranks, cuda=cuda)
    rows = [
        row
        for reduction, bucketed in CASES
        for row in measure(config, reduction=reduction, bucketed=bucketed, rates=args.rates, repeats=args.repeats)
    ]
    title = f"{size.model}, {size.layers} layers, {ranks} ranks, {dist.get_backend()}"
    replicas = config.parallel.data * config.parallel.context  # that share gradients; fewer than ranks with --flags
    report(rows, title=title, replicas=replicas, out=args.out)
    if args.hardware is not None and dist.get_rank() == 0:
        keep(rows, replicas=replicas, hosts=launch.hosts, table=args.hardware)
    dist.barrier()


def keep(rows: Sequence[dict[str, Any]], *, replicas: int, hosts: int, table: Path) -> None:
    """Add what was measured to the device's table, or say why not: the measurement itself is printed and written."""
    if hosts > 1:
        log.say(f"{table} holds what GPUs of one host do, these are of {hosts}: nothing was added to it")
        return
    try:
        added = add_collectives(table, rows, ranks=replicas, about=about()).collectives
    except ValueError as error:
        log.say(f"nothing was added for tools/plan.py: {error}")
        return
    log.say(f"{len(added)} collectives: {table}")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), help="default: llama-2-7b on GPUs, tiny on a CPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rates", type=Fraction, nargs="+", default=[Fraction(1, 2)])
    parser.add_argument("--repeats", type=int, default=10, help=f"timed reductions, after {WARM_UP} that are not")
    parser.add_argument("--flags", default="", help="more flags of pretrain_sat.py, in one string")
    parser.add_argument("--out", type=Path, help="JSON file; the picture lies beside it")
    results = ROOT / "benchmarks" / "results" / f"gemm-{slug(device_name())}.json"
    parser.add_argument("--hardware", type=Path, default=results, help="the table that tools/plan.py reads")
    parser.add_argument("--no-hardware", action="store_const", const=None, dest="hardware", help="leave it as it is")
    args = parser.parse_args(argv)
    if any(not 0 < rate < 1 for rate in args.rates):
        parser.error("--rates must lie between 0 and 1; everything, rate 0, is always measured")
    return args


@dataclass(frozen=True)
class _EachRate:
    """A schedule whose steps are the rates to measure."""

    rates: Sequence[Fraction]

    def rate(self, step: int) -> Fraction:
        return self.rates[step - 1]

    @property
    def last_step(self) -> int:
        return len(self.rates)


def wrapped(
    config: Config, *, sharded: bool, bucketed: bool, rates: Sequence[Fraction]
) -> tuple[list[DistributedDataParallel], Controller]:
    """The model in DDP, and what chooses its neurons."""
    gc.collect()  # of the last case: its hooks refer to themselves
    parallel = config.parallel
    layout = distributed.initialize_model_parallel(
        tp=parallel.tensor, pp=parallel.pipeline, cp=parallel.context, virtual_pp=parallel.virtual_pipeline, seed=1
    )
    transformer = TransformerConfig(**config.transformer)
    chunks = build_chunks(transformer, embedding_of(config.model, rows=config.model.rows(VOCABULARY, tp=1)))
    attach_selectors(chunks, config=config.selection, layout=layout)
    controller = Controller(sparse_modules(chunks), schedule=_EachRate(rates), interval=1)
    ddp = {**config.ddp, "use_distributed_optimizer": sharded, "overlap_grad_reduce": bucketed}
    ddp_config = DistributedDataParallelConfig(**{**ddp, "check_for_nan_in_grad": False})
    return wrap_chunks(chunks, config=transformer, ddp_config=ddp_config, one_bucket=False), controller


def measure(
    config: Config, *, reduction: str, bucketed: bool, rates: Sequence[Fraction], repeats: int
) -> list[dict[str, Any]]:
    """A row for the full reduction, and one for each rate."""
    rows: list[dict[str, Any]] = []
    chunks, controller = wrapped(config, sharded=reduction == "sharded", bucketed=bucketed, rates=rates)
    sparse = SparseReduction(chunks, entries=controller.filled_entries)
    for step, rate in enumerate(rates, start=1):
        with controller.step(step):
            sparse.begin_step()
            if not rows:
                rows.append({"rate": 0.0, **time_of(chunks, repeats=repeats), "apart": 0.0})
            expected = summed(chunks, controller)
            sparse.learn()
            found = summed(chunks, controller)
            apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, found, strict=True))
            del expected, found
            rows.append({"rate": float(rate), **time_of(chunks, repeats=repeats), "apart": of_slowest(apart)})
    buckets = [bucket for chunk in chunks for group in chunk.bucket_groups for bucket in group.buckets]
    divided = any(bucket.gradient_scaling_factor != 1.0 for bucket in buckets)
    for row in rows:
        row |= {"reduction": reduction, "bucketed": bucketed, "divided": divided}
        row |= {"share": row["bytes"] / rows[0]["bytes"], "speed": rows[0]["seconds"] / row["seconds"]}
    return rows


def summed(chunks: Sequence[DistributedDataParallel], controller: Controller) -> list[Tensor]:
    """Random gradients, reduced: by bucket, copies of the part that this rank gets."""
    generator = torch.Generator(_device()).manual_seed(dist.get_rank())
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.normal_(generator=generator)  # type: ignore[attr-defined]
    for parameter, dim, index in controller.filled_entries():
        gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        kept = gradient.index_select(dim, index)
        gradient.zero_()
        gradient.index_copy_(dim, index, kept)
    reduce(chunks)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    found = []
    for bucket in (bucket for chunk in chunks for group in chunk.bucket_groups for bucket in group.buckets):
        data = bucket.grad_data
        if chunks[0].ddp_config.use_distributed_optimizer:
            data = data.chunk(ranks)[rank]
        found.append(data.clone())
    return found


def reduce(chunks: Sequence[DistributedDataParallel]) -> None:
    """What follows the backward of a step's last micro-batch."""
    for chunk in chunks:
        for group in chunk.bucket_groups:
            group.reset()
        if chunk.ddp_config.overlap_grad_reduce:
            chunk.start_grad_sync()
        chunk.finish_grad_sync()


def time_of(chunks: Sequence[DistributedDataParallel], *, repeats: int) -> dict[str, Any]:
    """Bytes, calls and seconds of a reduction, and bytes of memory that it takes for a while."""
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    with counted(chunks) as wire:
        reduce(chunks)
    seconds = []
    for _ in range(WARM_UP + repeats):
        wait()
        dist.barrier()
        wait()
        clock = time.perf_counter()
        reduce(chunks)
        wait()
        seconds.append(of_slowest(time.perf_counter() - clock))
    memory = 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        reduce(chunks)
        wait()
        memory = torch.cuda.max_memory_allocated() - before
    return {
        "bytes": wire.bytes,
        "calls": wire.calls,
        "seconds": statistics.median(seconds[WARM_UP:]),
        "spread": max(seconds[WARM_UP:]) - min(seconds[WARM_UP:]),
        "memory": memory,
    }


def of_slowest(value: float) -> float:
    """The largest of all ranks' values."""
    found = torch.tensor([value], dtype=torch.float64, device=_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found.item())


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def report(rows: Sequence[dict[str, Any]], *, title: str, replicas: int, out: Path | None) -> None:
    """The table on the console, and everything in the JSON file; rank 0 alone."""
    columns = ("reduction", "buckets", "rate", "MiB", "of full", "ms", "times as fast", "MiB beside", "apart")
    log.table(
        title,
        columns,
        [
            (
                row["reduction"],
                "in turn" if row["bucketed"] else "at once",
                row["rate"],
                round(row["bytes"] / 2**20, 1),
                round(row["share"], 3),
                round(1e3 * row["seconds"], 2),
                round(row["speed"], 2),
                round(row["memory"] / 2**20, 1),
                f"{row['apart']:.1e}",
            )
            for row in rows
        ],
    )
    if out is not None and dist.get_rank() == 0:
        write_json(out, {"title": title, "replicas": replicas, "rows": list(rows)})
        draw_reduction(rows, out.with_suffix(".png"), title=title)


if __name__ == "__main__":
    main(sys.argv[1:])
    distributed.leave()
