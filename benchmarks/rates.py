"""What a device does with the parts of a step, each by itself: products by shape, attention, activations, the rest.

The result is a `Hardware`, which `tools/plan.py` predicts runs from. Shapes are those that the layers of given models
have when dense, and when sparse at some rates. `bench_comm` adds what several devices do together.
"""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.program import first_batches
from benchmarks.timing import median_seconds
from megatron_sat.build import Run
from megatron_sat.estimate.hardware import (
    Attended,
    Choosing,
    Collective,
    Hardware,
    Kind,
    Product,
    Reduction,
    load,
    save,
)
from megatron_sat.estimate.step import KINDS, linears, product_sizes
from megatron_sat.layers.fused import add_weight_gradient
from megatron_sat.model.flops import KeptShape, ModelShape

REPEATS, CALLS = 3, 4
STREAMED = 2**27
"""Entries of a tensor that is read and written to see how fast memory is: more than any cache holds."""
Sizes = tuple[int, ...]


def measure_products(wanted: Iterable[Sizes], *, dtype: torch.dtype) -> list[Product]:
    """Each (tokens, inputs, outputs) in all three kinds."""
    found = []
    for tokens, inputs, outputs in sorted(set(wanted)):
        for kind in KINDS:
            m, n, k = product_sizes(kind, tokens=tokens, inputs=inputs, outputs=outputs)
            found.append(Product(kind=kind, m=m, n=n, k=k, seconds=_product(kind, m=m, n=n, k=k, dtype=dtype)))
    return found


def _product(kind: Kind, *, m: int, n: int, k: int, dtype: torch.dtype) -> float:
    if kind == "weight":
        total = _random(m, n, dtype=torch.float32)
        inputs, gradient = _random(k, n, dtype=dtype), _random(k, m, dtype=dtype)
        return median_seconds(lambda: add_weight_gradient(inputs, gradient, total), repeats=REPEATS, calls=CALLS)
    left = _random(m, k, dtype=dtype)
    right = _random(n, k, dtype=dtype).t() if kind == "forward" else _random(k, n, dtype=dtype)
    return median_seconds(lambda: torch.matmul(left, right), repeats=REPEATS, calls=CALLS)


def _random(*size: int, dtype: torch.dtype) -> Tensor:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.randn(size, device=device).to(dtype)


def measure_attention(wanted: Iterable[Sizes], *, dtype: torch.dtype) -> list[Attended]:
    """Each (batch, sequence, heads, groups, head dim)."""
    found = []
    for batch, sequence, heads, groups, head_dim in sorted(set(wanted)):
        q = _random(batch, heads, sequence, head_dim, dtype=dtype).requires_grad_()
        k, v = (_random(batch, groups, sequence, head_dim, dtype=dtype).requires_grad_() for _ in range(2))
        gradient = torch.randn_like(q)

        def attend(q: Tensor = q, k: Tensor = k, v: Tensor = v, gradient: Tensor = gradient) -> None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
            torch.autograd.grad(out, (q, k, v), gradient)

        found.append(
            Attended(
                batch=batch,
                sequence=sequence,
                heads=heads,
                groups=groups,
                head_dim=head_dim,
                seconds=median_seconds(attend, repeats=REPEATS),
            )
        )
    return found


def measure_bytes_per_second(*, dtype: torch.dtype) -> float:
    """Of a kernel that reads one tensor and writes another."""
    entries = STREAMED if torch.cuda.is_available() else STREAMED // 2**6
    source, target = _random(entries, dtype=dtype), _random(entries, dtype=dtype)
    seconds = median_seconds(lambda: torch.add(source, 1.0, out=target), repeats=REPEATS, calls=CALLS)
    return 2 * entries * dtype.itemsize / seconds


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What a dense step of a one-layer model takes outside the layer."""

    tokens: int
    hidden_size: int
    per_logit: float
    """Of embedding, head and loss beyond the head's products, a token and row of the vocabulary."""
    per_parameter: float
    """Of a step beside its micro-batches."""


def measure_outside(run: Run, *, layer_seconds: float, dtype: torch.dtype, repeats: int) -> Outside:
    """Whole steps of one and of several micro-batches tell what a micro-batch is, and what is left of a step.

    layer_seconds: of the run's only layer and one micro-batch.
    """
    training, shape = run.config.training, run.shape
    tokens = training.micro_batch_size * shape.seq_length
    few, many = 1, training.num_micro_batches
    single, several = (_step_seconds(run, count, repeats=repeats) for count in (few, many))
    one = (several - single) / (many - few)
    head = measure_products([(tokens, shape.hidden_size, shape.padded_vocab_size)], dtype=dtype)
    beyond = one - layer_seconds - sum(product.seconds for product in head)
    parameters = sum(p.numel() for chunk in run.engine.chunks for p in chunk.parameters())
    return Outside(
        tokens=tokens,
        hidden_size=shape.hidden_size,
        per_logit=max(beyond, 0.0) / (tokens * shape.padded_vocab_size),
        per_parameter=max(single - one, 0.0) / parameters,
    )


def _step_seconds(run: Run, count: int, *, repeats: int) -> float:
    """Median of a dense step of ``count`` micro-batches, by the host's clock: a step ends with its loss there."""
    batches, seconds = first_batches(run, count), []
    for _ in range(2 + repeats):
        clock = time.perf_counter()
        run.engine.train_step(iter(batches), num_micro_batches=count)
        seconds.append(time.perf_counter() - clock)
    return statistics.median(seconds[2:])


def wanted_products(shape: ModelShape, kept: Sequence[KeptShape], *, tokens: Iterable[int]) -> list[Sizes]:
    """What layers of these kept shapes, and the head, ask for."""
    pairs = [pair for each in kept for pair in linears(shape, each).values()]
    pairs.append((shape.hidden_size, shape.padded_vocab_size))
    return [(count, inputs, outputs) for count in tokens for inputs, outputs in pairs]


def wanted_attention(shape: ModelShape, kept: Sequence[KeptShape], *, tokens: Iterable[int]) -> list[Sizes]:
    """What layers of these kept shapes attend to, in sequences of the model's length."""
    length = shape.seq_length
    batches = [max(count // length, 1) for count in tokens]
    return [(batch, length, each.heads, each.groups, shape.kv_channels) for batch in batches for each in kept]


def choosing_rows(layers: Sequence[dict[str, Any]]) -> list[Choosing]:
    """Of `bench_layer`'s rows, what packed layers take once a step, with the host in the way and without.

    A row for each number of entries, from the smallest micro-batch: what is beyond the micro-batches is a difference,
    and the longer these take, the more of it is noise. Noise below zero is zero.
    """
    found: dict[tuple[int, ...], Choosing] = {}
    for row in sorted((row for row in layers if row["weights"] == "compact"), key=lambda row: row["tokens"]):
        choosing = Choosing(
            weights=row["entries"],
            kept=row["kept_entries"],
            seconds=max(row["step_seconds_launched"], 0.0),
            device_seconds=max(row["step_seconds"], 0.0),
        )
        found.setdefault(choosing.sizes, choosing)
    return list(found.values())


REDUCTIONS: dict[str, Reduction] = {"all-reduce": "all-reduce", "sharded": "reduce-scatter"}
"""By the name of `bench_comm`'s cases, the collective that they make."""


def collective_rows(reductions: Sequence[dict[str, Any]], *, ranks: int, bytes_per_second: float) -> list[Collective]:
    """Of `bench_comm`'s rows, whole reductions as so many equal calls, without what the DDP does before: it divides
    the gradients by the number of replicas, in a kernel that reads and writes them once.

    bytes_per_second: of such a kernel. Raises ValueError where that leaves nothing.
    """
    found = []
    for row in (row for row in reductions if row["rate"] == 0):
        divided = 2 * row["bytes"] / bytes_per_second if row["divided"] else 0.0
        seconds = row["seconds"] - divided
        if not seconds > 0:
            raise ValueError(
                f"a reduction must take longer than dividing its gradients ({1e3 * divided:.3g} ms by the table), got "
                f"{1e3 * row['seconds']:.3g} ms; measure the table again, on this machine: benchmarks/bench_layer.py"
            )
        calls = row["calls"]
        kind, size = REDUCTIONS[row["reduction"]], row["bytes"] // calls
        found.append(Collective(kind=kind, ranks=ranks, size=size, seconds=seconds / calls))
    return found


def add_collectives(
    path: Path, reductions: Sequence[dict[str, Any]], *, ranks: int, about: Mapping[str, Any]
) -> Hardware:
    """Put what ``ranks`` devices of one host were measured to do into the table at ``path``, instead of what that had.

    about: where it comes from, its device included. Raises ValueError where there is no table or another device's.
    """
    table = load(path)
    if table.name != about["device"]:
        raise ValueError(
            f"--hardware must be the table of {about['device']}, {path} is that of {table.name}; name another file"
        )
    rows = collective_rows(reductions, ranks=ranks, bytes_per_second=table.bytes_per_second)
    table = replace(table, collectives=tuple(rows), collectives_about=dict(about))
    save(table, path)
    return table


def collectives_in(path: Path, *, device: str) -> dict[str, Any]:
    """Fields of `Hardware` that `add_collectives` has put into the table at ``path``; none where there is no table, no
    readable one, or one of another device."""
    try:
        table = load(path)
    except ValueError:
        return {}
    if table.name != device:
        return {}
    return {"collectives": table.collectives, "collectives_about": table.collectives_about}
