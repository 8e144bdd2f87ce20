"""Giving the sparse modules of a built model their selectors. Until then the model is dense Megatron.

The only place where the method meets process groups: which ranks hold other tokens of the same step.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from megatron_sat.distributed import Layout
from megatron_sat.layers.attention import SparseSelfAttention
from megatron_sat.layers.linear import SparseColumnParallelLinear, SparseRowParallelLinear
from megatron_sat.layers.mlp import SparseMLP
from megatron_sat.layers.sparse import SparsePair
from megatron_sat.sparsity.importance import Needs
from megatron_sat.sparsity.neurons import Channels, Heads, Neurons
from megatron_sat.sparsity.place import Place, Weights
from megatron_sat.sparsity.selector import SelectionConfig, Selector

Whole = Callable[[Tensor], Tensor]
"""A weight with all its values, where this rank may have been left a shard of them. Collective over the replicas."""

_Plan = tuple[Neurons, Literal["attention", "mlp"], int, int]
"""Neurons, kind, selection groups in the shard, multiple."""


def attach_selectors(
    chunks: Iterable[Module], *, config: SelectionConfig, layout: Layout, whole: Whole | None = None
) -> int:
    """Give every attention and MLP of this rank's model chunks that omits neurons a selector; returns how many do.

    whole: for an engine that leaves weights in shards; without it they come through the hooks of Megatron's DDP.

    Raises ValueError where selection groups or the channel multiple do not fit this TP size, these query
    groups or channels, and for settings of the model under which a choice could not be made or would not be
    obeyed.
    """
    count = 0
    for chunk in chunks:
        for layer in chunk.modules():
            number = getattr(layer, "layer_number", None)
            for module in (getattr(layer, "self_attention", None), getattr(layer, "mlp", None)):
                if isinstance(module, SparsePair) and number is not None and _omits(module, config, layer=number):
                    module.selector = build_selector(
                        module, layer=number, config=config, layout=layout, whole=whole
                    )
                    count += 1
    return count


def _omits(module: SparsePair, config: SelectionConfig, *, layer: int) -> bool:
    kind: Literal["attention", "mlp"] = "attention" if isinstance(module, SparseSelfAttention) else "mlp"
    return config.omits(kind, layer=layer, num_layers=module.config.num_layers)


def build_selector(
    module: SparsePair, *, layer: int, config: SelectionConfig, layout: Layout, whole: Whole | None = None
) -> Selector:
    """The selector of one module of global layer ``layer`` (from 1)."""
    _refuse(module.config)
    column, row = module.linear_pair()
    if isinstance(module, SparseSelfAttention):
        neurons, kind, groups, multiple = _heads(module, config, layout)
    else:
        assert isinstance(module, SparseMLP)
        neurons, kind, groups, multiple = _channels(module, config, layout)
    place = Place(
        kind=kind,
        layer=layer,
        shard=layout.tp_rank,
        num_shards=layout.tp_size,
        groups=groups,
        multiple=multiple,
    )
    return Selector(
        neurons,
        place=place,
        config=config,
        weights=_weights(column, row, whole=whole),
        add_ranks=_adder(config, layout, sequence_parallel=module.config.sequence_parallel),
    )


def _weights(
    column: SparseColumnParallelLinear, row: SparseRowParallelLinear, *, whole: Whole | None
) -> Weights:
    """The parameters themselves, not the layers' attributes: ZeRO-3 takes asking a layer for use, and gathers."""
    columns, rows = column.weight, row.weight
    if whole is not None:
        return Weights(column=lambda: columns, row=lambda: rows, whole=whole)
    return Weights(column=lambda: columns, row=lambda: rows, arrive=lambda: _wait_for(column, row))


def _wait_for(*layers: Module) -> None:
    """Let late weights arrive. With --overlap-param-gather Megatron's DDP waits for the other replicas' parts
    in a pre-hook of a layer's forward, and scoring comes before that forward; waiting twice is free."""
    for layer in layers:
        for hook in layer._forward_pre_hooks.values():
            hook(layer, ())


def _refuse(model: TransformerConfig) -> None:
    """Settings of the model that would bypass the choice, or starve it of tokens."""
    if model.cuda_graph_impl != "none":
        raise ValueError(
            f"--cuda-graph-impl must be none for sparse training, got {model.cuda_graph_impl}; "
            "a graph would replay one step's choice for ever"
        )
    chunks = getattr(model, "mlp_chunks_for_training", 1)  # from 0.19
    if chunks != 1:
        raise ValueError(
            f"--mlp-chunks-for-training must be 1 for sparse training, got {chunks}; "
            "an MLP would score its channels on the first chunk of the sequence alone"
        )
    if model.attention_output_gate:
        raise ValueError(
            "--attention-output-gate must be off for sparse training, got it on; a head's gate has no place "
            "among the rows that leave with it"
        )


def _heads(module: SparseSelfAttention, config: SelectionConfig, layout: Layout) -> _Plan:
    all_groups = module.config.num_query_groups
    if all_groups is not None and all_groups < layout.tp_size:
        raise ValueError(
            f"--num-query-groups ({all_groups}) must be at least the tensor-parallel size ({layout.tp_size}) "
            f"for sparse training; try --tensor-model-parallel-size {all_groups}"
        )
    groups, whole = module.num_query_groups_per_partition, config.gqa == "group"
    neurons = Heads(
        groups=groups,
        heads_per_group=module.num_attention_heads_per_partition // groups,
        head_dim=module.hidden_size_per_attention_head,
        whole_groups=whole,
    )
    # heads that leave singly have their quota in every query group, so the choice never depends on TP
    quotas = _groups_here(config, layout, units=groups, noun="query groups") if whole else groups
    return neurons, "attention", quotas, 1


def _channels(module: SparseMLP, config: SelectionConfig, layout: Layout) -> _Plan:
    gated = module.config.gated_linear_unit
    units = module.linear_fc1.output_size_per_partition // (2 if gated else 1)
    neurons = Channels(units=units, gated=gated, score_source=config.swiglu_score)
    quotas = _groups_here(config, layout, units=units, noun="channels")
    return neurons, "mlp", quotas, config.channel_multiple


def _groups_here(config: SelectionConfig, layout: Layout, *, units: int, noun: str) -> int:
    """Selection groups in this rank's shard of ``units``."""
    groups = config.selection_groups
    if groups % layout.tp_size:
        raise ValueError(
            f"--sat-selection-groups ({groups}) must be a multiple of the tensor-parallel size "
            f"({layout.tp_size}); try {layout.tp_size}"
        )
    here = groups // layout.tp_size
    if units % here:
        raise ValueError(
            f"--sat-selection-groups ({groups}) must divide the {noun} ({units * layout.tp_size}); try {layout.tp_size}"
        )
    return here


def _adder(config: SelectionConfig, layout: Layout, *, sequence_parallel: bool) -> Callable[[Tensor, Needs], Tensor]:
    """Adds sums over the ranks which hold other tokens: CP always, DP if shared, TP for inputs under SP."""
    replicas = layout.dp_cp_group if config.dp_selection == "shared" else layout.cp_group

    def add_ranks(sums: Tensor, needs: Needs) -> Tensor:
        if needs == "nothing":
            return sums
        across_tp = [layout.tp_group] if sequence_parallel and needs == "inputs" else []
        for group in [*across_tp, replicas]:
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
        return sums

    return add_ranks
