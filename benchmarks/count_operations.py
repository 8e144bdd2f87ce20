#!/usr/bin/env python3
"""How many of PyTorch's operations a layer asks for in a step inside transformers: dense, and by each way of choosing.

    count_operations.py [--micro-batches 1 4] [--out FILE]

Counted, not timed: a step of a small Llama of two and of four layers, forward and backward under bf16 autocast, half of
it left out; the difference of the two is two layers. Views, which move nothing, are not counted. Where a model or a
micro-batch is small, asking for operations is what a GPU waits for. The counts are a CPU's; a GPU's differ by a few.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.program import write_json
from megatron_sat import log
from megatron_sat.hf import sparsify
from megatron_sat.hf.model import PAPER
from megatron_sat.sparsity.schedule import ScheduleConfig, build_schedule
from megatron_sat.sparsity.selector import SelectionConfig

LAYERS = (2, 4)
STEPS = 2
"""The second step's are counted: what is prepared once has been."""
CONTRIBUTION = SelectionConfig(importance="contribution", selection="top-k")
WAYS: dict[str, SelectionConfig | None] = {
    "dense": None,
    "contribution, top-k, kept": replace(CONTRIBUTION, selection_interval=STEPS),
    "contribution, top-k, each step": CONTRIBUTION,
    "maxip, sampling, each step (the paper's)": PAPER,
}


class Operations(TorchDispatchMode):
    """Counts what is asked for while it is entered, but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def main(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Count for every way; returns a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4], help="of a step")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    if min(args.micro_batches) < 1:
        parser.error(f"--micro-batches must be at least 1, got {min(args.micro_batches)}")
    rows = [
        {"choice": name, "micro-batches": number, "operations": of_a_layer(way, micro_batches=number)}
        for number in args.micro_batches
        for name, way in WAYS.items()
    ]
    heads = ("choice", "micro-batches", "operations")
    log.table("operations of a layer in a step", heads, [[str(row[head]) for head in heads] for row in rows])
    if args.out is not None:
        write_json(args.out, {"rows": rows})
    return rows


def of_a_layer(way: SelectionConfig | None, *, micro_batches: int) -> float:
    """Operations that a layer more costs a step of ``way`` (None: dense)."""
    few, many = (of_a_step(layers, way, micro_batches=micro_batches) for layers in LAYERS)
    return (many - few) / (LAYERS[1] - LAYERS[0])


def of_a_step(layers: int, way: SelectionConfig | None, *, micro_batches: int) -> int:
    """Operations of a model's second step: forwards, backwards, and what opens and closes it."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers, num_key_value_heads=2)).train()
    schedule = build_schedule(ScheduleConfig(kind="constant", omission_rate=Fraction(1, 2), train_iters=STEPS))
    sparse = None if way is None else sparsify(model, schedule=schedule, selection=way)
    tokens = torch.randint(256, (4, 32))
    mask = torch.ones_like(tokens)
    mask[0, 20:] = 0  # filling, as batches of examples have it
    for step in range(1, STEPS + 1):
        with Operations() as counted:
            if sparse is not None:
                last = iter([False] * (micro_batches - 1) + [True])
                sparse.open(step, is_last=partial(next, last))
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(input_ids=tokens, attention_mask=mask, labels=tokens).loss
                loss.backward()
            if sparse is not None:
                sparse.close()
        model.zero_grad()
    return counted.count


if __name__ == "__main__":
    main(sys.argv[1:])
