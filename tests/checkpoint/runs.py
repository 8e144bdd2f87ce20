"""Runs that save and load, for the tests of checkpoints: what a rank does, forked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat.checkpoint.header import Header
from megatron_sat.checkpoint.resume import LoadConfig, Resumed, load_checkpoint, open_checkpoint
from megatron_sat.checkpoint.saving import Unfinished, begin_checkpoint, save_checkpoint
from megatron_sat.distributed import Layout
from megatron_sat.engines.megatron import MegatronEngine
from tests.helpers.plain_engine import bits, make_engine, train, weights

LOSS, NORM = 2e-6, 5e-6  # another layout sums in another order, fp32
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
FP16 = {"fp16": True, "params_dtype": torch.float16, "pipeline_dtype": torch.float16}
LATE = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
DISTRIBUTED = {"use_distributed_optimizer": True}
DATA = {"blend": [0.7, "zh", 0.3, "en"], "seed": 1}


def sat_tensors(layout: Layout) -> dict[str, Tensor]:
    """What a controller would give: other layers on other stages, the same on all other ranks."""
    first = 4 // layout.pp_size * layout.pp_rank
    return {
        f"sat.layers.{layer}.mlp.kept": torch.arange(layer, 20 + layer)
        for layer in range(first, first + 4 // layout.pp_size)
    } | {
        f"sat.layers.{first}.mlp.mean": torch.full((32,), 0.1 + first),
        f"sat.layers.{first}.ever": torch.tensor([True]),
    }


def header(iteration: int, **changes: Any) -> Header:
    fields: dict[str, Any] = {"tokenizer": "abc", "data": DATA, "extra": {"rung": 2}, "config": {"lr": 3e-3}}
    return Header(iteration=iteration, consumed_train_samples=8 * iteration, **{**fields, **changes})


def save(engine: MegatronEngine, layout: Layout, root: Path, *, iteration: int, **how: Any) -> Path:
    return save_checkpoint(
        root, trainer=engine, header=header(iteration), tensors=sat_tensors(layout), layout=layout, **how
    )


def begin(engine: MegatronEngine, layout: Layout, root: Path, *, iteration: int, **how: Any) -> Unfinished:
    return begin_checkpoint(
        root, trainer=engine, header=header(iteration), tensors=sat_tensors(layout), layout=layout, **how
    )


def load(engine: MegatronEngine, layout: Layout, root: Path, *, step: int | None = None, **flags: Any) -> Resumed:
    expected: dict[str, Any] = {"tokenizer": "abc", "data": DATA}
    expected |= {key: flags.pop(key) for key in ("tokenizer", "data") if key in flags}
    checkpoint = open_checkpoint(root, step=step)
    return load_checkpoint(checkpoint, trainer=engine, layout=layout, config=LoadConfig(**flags), **expected)


def state_bits(engine: MegatronEngine) -> dict[str, bytes]:
    """Weights, fp32 copies and moments of this rank, and what the schedule writes, as bytes."""
    engine.gather_weights()
    tensors = weights(engine)
    inner = engine._optimizer.chained_optimizers[0].optimizer
    for group_index, group in enumerate(inner.param_groups):
        tensors[f"{group_index}.rates"] = torch.tensor([group["lr"], group["weight_decay"]])
        for index, main in enumerate(group["params"]):
            tensors[f"{group_index}.{index}.main"] = main.detach().clone()
            for key, tensor in inner.state[main].items():
                tensors[f"{group_index}.{index}.{key}"] = tensor.detach().clone().reshape(-1)
    return bits(tensors)


def to_the_end(rank: int, settings: dict[str, Any], root: Path | None) -> tuple[list[Any], dict[str, bytes]]:
    """Five steps; with a root, a checkpoint after the second."""
    engine, layout = make_engine(**settings)
    steps = train(engine, layout, steps=range(2))
    if root is not None:
        save(engine, layout, root, iteration=2)
    return steps + train(engine, layout, steps=range(2, 5)), state_bits(engine)


def go_on(rank: int, settings: dict[str, Any], root: Path, **flags: Any) -> tuple[list[Any], dict[str, bytes], Resumed]:
    """Load into a new engine whose weights were something else, then three steps."""
    engine, layout = make_engine(**settings)
    with torch.no_grad():
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                parameter.normal_()
    resumed = load(engine, layout, root, **flags)
    return train(engine, layout, steps=range(2, 5)), state_bits(engine), resumed


def untouched(rank: int, settings: dict[str, Any], root: Path, flags: dict[str, Any]) -> str:
    """The refusal of a load, after which the engine must be as it was."""
    engine, layout = make_engine(**settings)
    train(engine, layout, steps=range(1))
    before = state_bits(engine)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the caller matches the text
        load(engine, layout, root, **flags)
    assert state_bits(engine) == before
    return str(refusal.value)
