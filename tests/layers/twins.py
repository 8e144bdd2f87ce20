"""A sparse module and its dense twin: Megatron's own with the output weights of omitted neurons at zero.
 The twin shares nothing with ours but the numbers: plain linear layers, Megatron's core attention with its
whole score matrix, masks written down from the layout of the weights. In float64, unless asked otherwise,
equal means to 1e-7.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_sat.distributed import current_layout
from megatron_sat.layers.attach import build_selector
from megatron_sat.layers.attention import SparseSelfAttention
from megatron_sat.layers.mlp import SparseMLP
from megatron_sat.layers.norm import RMSNorm
from megatron_sat.layers.sparse import SparsePair
from megatron_sat.model.spec import sparse_attention_spec
from megatron_sat.sparsity.controller import Controller
from megatron_sat.sparsity.schedule import ScheduleConfig, build_schedule
from megatron_sat.sparsity.selector import SelectionConfig, Selector
from tests.helpers.tiny import tiny_config

SEQUENCE, BATCH = 12, 2


class Pair(NamedTuple):
    """A sparse module, its twin of the same weights, and what both take beside the tokens."""

    sparse: SparsePair
    twin: nn.Module
    rest: dict[str, Any]


def attention_pair(core: type[nn.Module] = DotProductAttention, **changes: Any) -> Pair:
    """Self-attention with RoPE. core: what the twin attends with."""
    config = tiny_config(**{"params_dtype": torch.float64, **changes})
    submodules = sparse_attention_spec(config).submodules
    sparse = SparseSelfAttention(config, submodules, 1, attn_mask_type=AttnMaskType.causal)
    norm = RMSNorm if config.qk_layernorm else IdentityOp
    plain = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=core,
        linear_proj=RowParallelLinear,
        q_layernorm=norm,
        k_layernorm=norm,
    )
    twin = SelfAttention(config, plain, 1, attn_mask_type=AttnMaskType.causal)
    rotary = RotaryEmbedding(config.kv_channels, rotary_percent=1.0, use_cpu_initialization=True)(SEQUENCE)
    return _alike(sparse, twin, {"attention_mask": None, "rotary_pos_emb": rotary})


def mlp_pair(**changes: Any) -> Pair:
    """SwiGLU MLP, unless the changes say otherwise."""
    config = tiny_config(**{"params_dtype": torch.float64, **changes})
    plain = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return _alike(SparseMLP(config), MLP(config, plain, ffn_hidden_size=config.ffn_hidden_size), {})


def _alike(sparse: SparsePair, twin: nn.Module, rest: dict[str, Any]) -> Pair:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    twin.load_state_dict(sparse.state_dict())
    return Pair(sparse, twin, rest)


def attach(sparse: SparsePair, **selection: Any) -> Selector:
    """Give one module a selector as `attach_selectors` would."""
    config = SelectionConfig(**selection)
    sparse.selector = build_selector(sparse, layer=1, config=config, layout=current_layout())
    return sparse.selector


@contextmanager
def step(sparse: SparsePair, *, rate: Fraction, number: int = 1) -> Iterator[None]:
    """One step at a constant rate."""
    schedule = build_schedule(ScheduleConfig(kind="constant", omission_rate=rate, train_iters=number))
    with Controller([sparse], schedule=schedule, interval=1).step(number):
        yield


class Masks(NamedTuple):
    """Which entries of the two matrices a step used."""

    rows: Tensor
    """[k] bool along the column-parallel weight."""
    columns: Tensor
    """[k] bool along the row-parallel weight."""


def attention_masks(index: Tensor, config: TransformerConfig, *, gqa: str) -> Masks:
    """From kept query groups ("group") or heads ("head"): rows are a group's heads, its key, its value."""
    groups, heads, size = config.num_query_groups, config.num_attention_heads, config.kv_channels
    assert groups is not None and size is not None
    key = torch.ones(groups, 1, dtype=torch.bool)
    if gqa == "group":
        key = torch.zeros(groups, 1, dtype=torch.bool)
        key[index] = True
        query = key.expand(groups, heads // groups)
    else:
        query = torch.zeros(heads, dtype=torch.bool)
        query[index] = True
        query = query.view(groups, -1)
    rows = torch.cat([query, key, key], dim=1)
    return Masks(*(blocks.flatten().repeat_interleave(size) for blocks in (rows, query)))


def mlp_masks(index: Tensor, config: TransformerConfig) -> Masks:
    """From kept channels: channel i is row i of gate, row i of up, column i of down."""
    columns = torch.zeros(config.ffn_hidden_size, dtype=torch.bool)
    columns[index] = True
    return Masks(torch.cat([columns, columns]) if config.gated_linear_unit else columns, columns)


class Run(NamedTuple):
    """What a module gave for the same tokens and the same gradient of its output."""

    output: Tensor
    input_grad: Tensor
    grads: dict[str, Tensor]


def run(module: nn.Module, rest: dict[str, Any]) -> Run:
    """Forward and backward of fixed tokens [s, b, h]; a bias that is handed back takes part."""
    generator = torch.Generator().manual_seed(11)
    shape, dtype = (SEQUENCE, BATCH, 64), next(module.parameters()).dtype
    tokens, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    tokens.requires_grad_()
    module.zero_grad()
    output, bias = module(tokens, **rest)
    if bias is not None:
        output = output + bias
    output.backward(grad)
    assert tokens.grad is not None
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return Run(output.detach(), tokens.grad, found)


def run_twin(pair: Pair, masks: Masks, *, row_weight: str) -> Run:
    """The twin without the omitted columns of ``row_weight``: zero in the forward, cut from its gradient."""
    with torch.no_grad():
        dict(pair.twin.named_parameters())[row_weight].mul_(masks.columns)
    found = run(pair.twin, pair.rest)
    found.grads[row_weight].mul_(masks.columns)
    return found


def assert_same(ours: Run, twins: Run) -> None:
    """Output, gradient of the tokens and of every parameter agree."""
    torch.testing.assert_close(ours.output, twins.output)
    torch.testing.assert_close(ours.input_grad, twins.input_grad)
    torch.testing.assert_close(ours.grads, twins.grads)
