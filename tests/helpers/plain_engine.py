"""A MegatronEngine around the plain tiny GPT, in whatever layout a test asks for."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_sat.data.batch import cut_for_context_parallel
from megatron_sat.distributed import Layout, initialize_model_parallel
from megatron_sat.engines.megatron import MegatronEngine
from megatron_sat.engines.optim import LearningRateConfig, make_optimizer_config
from tests.helpers.plain_gpt import MICRO, SEQ, make_batches, make_chunks, make_config

MICRO_BATCHES = 4  # of the global batch


def make_engine(
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    virtual_pp: int | None = None,
    tied: bool = False,
    vocab: int = 96,
    build: Callable[[TransformerConfig], list[nn.Module]] | None = None,
    model: dict[str, Any] | None = None,
    ddp: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    rate: dict[str, Any] | None = None,
) -> tuple[MegatronEngine, Layout]:
    """An engine on the ranks there are, around plain layers or what `build` makes.

    model, ddp, optim, rate: changes to the four configurations.
    """
    layout = initialize_model_parallel(tp=tp, pp=pp, cp=cp, virtual_pp=virtual_pp, seed=1234)
    config = make_config(**(model or {}))
    ddp_config = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **(ddp or {})})
    settings: dict[str, Any] = {"lr": 3e-3, "min_lr": 3e-4, "lr_decay_style": "cosine", "weight_decay": 0.1}
    settings |= {"lr_warmup_iters": 2, "lr_warmup_init": 1e-3}
    settings |= {"train_iters": 20, "global_batch_size": MICRO * MICRO_BATCHES}
    learning_rate = LearningRateConfig(**{**settings, **(rate or {})})
    optimizer_config = make_optimizer_config(
        learning_rate, model=config, ddp=ddp_config, **{"clip_grad": 1.0, "adam_beta2": 0.95, **(optim or {})}
    )
    engine = MegatronEngine(
        build(config) if build else make_chunks(config, tied=tied, vocab=vocab),
        layout=layout,
        ddp_config=ddp_config,
        optimizer_config=optimizer_config,
        learning_rate=learning_rate,
        seq_length=SEQ,
        micro_batch_size=MICRO,
    )
    return engine, layout


def train(engine: MegatronEngine, layout: Layout, *, steps: range, masked: bool = True) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    results = []
    for step in steps:
        result = engine.train_step(
            batches_of(step, layout, masked=masked), num_micro_batches=MICRO_BATCHES // layout.dp_size
        )
        results.append((result.loss, result.grad_norm))
    return results


def batches_of(step: int, layout: Layout, *, masked: bool = True) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches of a step."""
    for batch in make_batches(step, total=MICRO_BATCHES, ranks=layout.dp_size, rank=layout.dp_rank, masked=masked):
        if layout.cp_size > 1:
            del batch["attention_mask"]  # the core attention makes its own for its two chunks
        yield dict(cut_for_context_parallel(batch, cp_rank=layout.cp_rank, cp_size=layout.cp_size))


def weights(engine: MegatronEngine) -> dict[str, Tensor]:
    """Copies of this rank's parameters by name and chunk."""
    return {
        f"{index}.{name}": parameter.detach().clone()
        for index, chunk in enumerate(engine.chunks)
        for name, parameter in chunk.named_parameters()
    }


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """Tensors as bytes: equal only if bit-identical."""
    return {name: t.cpu().contiguous().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
