"""The layer specification: Megatron's local one, with the sparse attention and MLP, norm and core attention.
 Parameter names and checkpoint keys are those of Megatron's own GPT layers, so a checkpoint opens there
without us.
"""

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Module

from megatron_sat.layers.attention import SparseSelfAttention
from megatron_sat.layers.core_attention import FlashCoreAttention, SDPACoreAttention, core_attention
from megatron_sat.layers.graphed import GraphedLayer
from megatron_sat.layers.linear import SparseColumnParallelLinear, SparseRowParallelLinear
from megatron_sat.layers.mlp import SparseMLP
from megatron_sat.layers.norm import layer_norm, rms_norm

_NORMS = {"RMSNorm": rms_norm, "LayerNorm": layer_norm}
"""By the name that ``--normalization`` takes."""


def norm_for(config: TransformerConfig) -> type[Module]:
    """The norm for this configuration on this machine. Raises ValueError for other than plain RMSNorm and LayerNorm."""
    if config.normalization not in _NORMS:
        raise ValueError(
            f"--normalization must be one of {', '.join(_NORMS)} for sparse layers, got {config.normalization}; "
            "Llama-like models have RMSNorm, GPT-2 LayerNorm"
        )
    if config.layernorm_zero_centered_gamma:
        raise ValueError(
            "--apply-layernorm-1p must be off for sparse layers, got it on; their norms know no 1 + weight"
        )
    choose = _NORMS[config.normalization]
    return choose(cuda=torch.cuda.is_available(), memory_efficient=config.memory_efficient_layer_norm)


def core_attention_for(config: TransformerConfig) -> type[SDPACoreAttention]:
    """The core attention that ``--attention-backend`` asks for: auto, or flash, which insists on flash-attn.

    Raises ValueError for the other backends, of Megatron and Transformer Engine: they take all heads only.
    """
    choices = {
        AttnBackend.auto: core_attention(cuda=torch.cuda.is_available()),
        AttnBackend.flash: FlashCoreAttention,
    }
    if config.attention_backend not in choices:
        raise ValueError(
            "--attention-backend must be auto or flash for sparse layers, got "
            f"{config.attention_backend.name}; auto takes flash-attn where installed, else torch's SDPA"
        )
    return choices[config.attention_backend]


def sparse_attention_spec(config: TransformerConfig) -> ModuleSpec:
    """A causal `SparseSelfAttention`; with a norm of every head's query and key for QK-norm (Qwen3)."""
    norm = norm_for(config) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SparseSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=SparseColumnParallelLinear,
            core_attention=core_attention_for(config),
            linear_proj=SparseRowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def sparse_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One transformer layer. Raises ValueError for what neither Llama nor GPT-2 has: experts, latent attention, ..."""
    if config.num_moe_experts is not None or config.multi_latent_attention:
        raise ValueError(
            f"sparse layers are for dense Llama-like models, got num_moe_experts={config.num_moe_experts}, "
            f"multi_latent_attention={config.multi_latent_attention}; leave both off"
        )
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm_for(config)
    spec.submodules.self_attention = sparse_attention_spec(config)
    spec.submodules.mlp = SparseMLP
    spec.module = GraphedLayer
    return spec


def sparse_block_spec(config: TransformerConfig, *, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline chunk, and the final norm."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[sparse_layer_spec(config)] * layers, layer_norm=norm_for(config))
