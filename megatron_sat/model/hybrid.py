"""The sparse layers in Megatron's HybridModel, to which GPTModel is being deprecated (0.19 and newer).

There a layer is an attention (``*``) or an MLP (``-``), so a Llama of n layers has the pattern ``*-`` n times
over. Two things stand between HybridModel and a machine without Transformer Engine: its specifications, which
name TE's layers, and its stack, which builds the final norm from TE and nothing else. This room has one of
each. Other symbols of the pattern (Mamba, experts, ...) are left out: no neurons are known in their modules.
"""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_sat.layers.mlp import SparseMLP
from megatron_sat.model.spec import norm_for, sparse_attention_spec


class SparseHybridStack(HybridStack):
    """Megatron's stack with our final norm."""

    def __init__(self, config: TransformerConfig, *args: Any, post_layer_norm: bool = True, **kwargs: Any) -> None:
        # 0.19 builds TENorm here, which needs Transformer Engine; may go when the norm is in the spec
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            norm = norm_for(config)
            self.final_norm = norm(config, config.hidden_size, config.layernorm_epsilon)


def sparse_hybrid_stack_spec(config: TransformerConfig) -> ModuleSpec:
    """What ``HybridModel(config, hybrid_stack_spec=...)`` takes: attention and MLP layers with their norms.

    Raises ValueError for norms, attention backends and experts as `sparse_layer_spec` does.
    """
    norm = norm_for(config)
    attention = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=sparse_attention_spec(config),
        self_attn_bda=get_bias_dropout_add,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=norm,
        mlp=SparseMLP,
        mlp_bda=get_bias_dropout_add,
    )
    return ModuleSpec(
        module=SparseHybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )
