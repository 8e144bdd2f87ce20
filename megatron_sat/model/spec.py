"""The layer specification: Megatron's local one, with the sparse attention and MLP, our norm, and SDPA inside.

Parameter names and checkpoint keys are those of Megatron's own GPT layers, so a checkpoint opens there without us.
"""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sat.layers.attention import SparseSelfAttention
from megatron_sat.layers.core_attention import SDPACoreAttention
from megatron_sat.layers.linear import SparseColumnParallelLinear, SparseRowParallelLinear
from megatron_sat.layers.mlp import SparseMLP
from megatron_sat.layers.norm import RMSNorm


def sparse_attention_spec(*, qk_layernorm: bool) -> ModuleSpec:
    """A causal `SparseSelfAttention` over SDPA; with `RMSNorm` of every head's query and key for QK-norm (Qwen3)."""
    norm = RMSNorm if qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SparseSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=SparseColumnParallelLinear,
            core_attention=SDPACoreAttention,
            linear_proj=SparseRowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def sparse_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One transformer layer. Raises ValueError for what is not Llama-like: experts, latent attention, other norms."""
    if config.normalization != "RMSNorm":
        raise ValueError(f"--normalization must be RMSNorm for sparse layers, got {config.normalization}")
    if config.num_moe_experts is not None or config.multi_latent_attention:
        raise ValueError(
            f"sparse layers are for dense Llama-like models, got num_moe_experts={config.num_moe_experts}, "
            f"multi_latent_attention={config.multi_latent_attention}; leave both off"
        )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention = sparse_attention_spec(qk_layernorm=config.qk_layernorm)
    spec.submodules.mlp = SparseMLP
    return spec


def sparse_block_spec(config: TransformerConfig, *, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline chunk, and the final norm."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[sparse_layer_spec(config)] * layers, layer_norm=RMSNorm)
