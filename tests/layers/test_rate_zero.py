"""Ten updates at omission rate 0 are Megatron's own, bit for bit: losses, gradients and weights."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from megatron_sat.distributed import Layout
from megatron_sat.model.spec import norm_for, sparse_layer_spec
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import GPT2, GPT2_OUTSIDE, SEQ, VOCAB, batch, layout, losses, tiny_chunks, tiny_config
from tests.layers.steps import attached

STEPS = 10


def megatrons(weights: dict[str, Any], **changes: Any) -> nn.Module:
    """The same model of Megatron's classes; only norm and core attention are ours, or bits would differ."""
    outside = {"position_embedding_type": "rope"} | {k: changes.pop(k) for k in GPT2_OUTSIDE if k in changes}
    config = tiny_config(**changes)
    spec = sparse_layer_spec(config)
    attention = spec.submodules.self_attention
    attention.module = SelfAttention
    attention.submodules.linear_qkv, attention.submodules.linear_proj = (
        ColumnParallelLinear,
        RowParallelLinear,
    )
    plain = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    spec.submodules.mlp = ModuleSpec(module=MLP, submodules=plain)
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=norm_for(config)),
        vocab_size=VOCAB,
        max_sequence_length=SEQ,
        **outside,
    )
    model.load_state_dict(weights)
    return model


def train(model: nn.Module, there: Layout, *, rate: Fraction) -> list[Tensor]:
    """The losses of ten steps, the last gradients and the last weights."""
    selection = {"selection_groups": there.tp_size}
    controller = attached([model], selection=selection, there=there, rate=rate, steps=STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model_parallel_cuda_manual_seed(2, force_reset_rng=True)  # of dropout
    found = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        with controller.step(step):
            loss = losses(model, *batch(step, 2)).mean()
            loss.backward()
        optimizer.step()
        found.append(loss.detach())
    parameters = list(model.parameters())
    return [*found, *(p.grad for p in parameters), *(p.detach() for p in parameters)]


def both(_: int, tp: int, rate: Fraction, changes: dict[str, Any]) -> list[list[Tensor]]:
    """Ours at the rate, and Megatron's, which has nothing that could be omitted."""
    there = layout(tp=tp)
    (ours,) = tiny_chunks(**changes)
    plain = megatrons(ours.state_dict(), **changes)
    return [train(model, there, rate=rate) for model in (ours, plain)]


MODELS = pytest.mark.parametrize(
    "tp, changes",
    [
        (1, {}),
        (1, {"add_bias_linear": True, "qk_layernorm": True}),
        (2, {"sequence_parallel": True, "num_layers": 2}),
        (1, GPT2 | GPT2_OUTSIDE | {"hidden_dropout": 0.1, "attention_dropout": 0.1, "num_layers": 2}),
    ],
    ids=["llama", "biases-qk-norm", "tp2-sp", "gpt2-dropout"],
)


@MODELS
def test_ten_updates_at_rate_0_are_megatrons_bit_for_bit(tp: int, changes: dict[str, Any]) -> None:
    for ours, plain in run_ranks(both, tp, tp, Fraction(0), changes):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))


def test_ten_updates_at_a_quarter_are_not() -> None:
    ours, plain = run_ranks(both, 1, 1, Fraction(1, 4), {})[0]
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(ours[1:], plain[1:], strict=True))
