"""From a TransformerConfig to this rank's model chunks: Megatron's GPTModel on the sparse specification."""

import logging
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sat.model.settings import ModelConfig
from megatron_sat.model.spec import sparse_block_spec


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What lies outside the layers: vocabulary, positions, and whether the head is the embedding."""

    padded_vocab_size: int
    """Rows of the embedding over all TP ranks; a multiple of the TP size."""
    max_sequence_length: int
    share_embeddings_and_output_weights: bool = False
    position_embedding_type: str = "rope"
    rotary_percent: float = 1.0
    rotary_base: int = 10000
    rope_scaling: bool = False
    """Llama-3's scaling of the rotary frequencies."""
    rope_scaling_factor: float = 8.0
    rotary_seq_len_interpolation_factor: float | None = None
    fp16_lm_cross_entropy: bool = False


def embedding_of(model: ModelConfig, *, rows: int) -> Embedding:
    """What a model's settings say outside the layers. rows: of the embedding over all TP ranks."""
    return Embedding(
        padded_vocab_size=rows,
        max_sequence_length=model.max_position_embeddings,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        rotary_seq_len_interpolation_factor=model.rotary_seq_len_interpolation_factor,
        fp16_lm_cross_entropy=model.fp16_lm_cross_entropy,
    )


def build_chunk(config: TransformerConfig, embedding: Embedding, *, vp_stage: int | None = None) -> GPTModel:
    """One pipeline chunk of this rank, dense until selectors are attached.

    vp_stage: the chunk's number under interleaving.
    """
    # 0.19 announces HybridModel each time
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    where = {"ignore_virtual": False, "vp_stage": vp_stage}
    return GPTModel(
        config,
        sparse_block_spec(config, vp_stage=vp_stage),
        vocab_size=embedding.padded_vocab_size,
        max_sequence_length=embedding.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        fp16_lm_cross_entropy=embedding.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=embedding.share_embeddings_and_output_weights,
        position_embedding_type=embedding.position_embedding_type,
        rotary_percent=embedding.rotary_percent,
        rotary_base=embedding.rotary_base,
        rope_scaling=embedding.rope_scaling,
        rope_scaling_factor=embedding.rope_scaling_factor,
        seq_len_interpolation_factor=embedding.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
    )


def build_chunks(config: TransformerConfig, embedding: Embedding) -> list[torch.nn.Module]:
    """All chunks of this rank, on its device, in bf16 or fp16 where the config says so."""
    stages = config.virtual_pipeline_model_parallel_size
    numbers: list[int | None] = [None] if stages is None else list(range(stages))
    chunks: list[torch.nn.Module] = [build_chunk(config, embedding, vp_stage=stage) for stage in numbers]
    if torch.cuda.is_available():
        chunks = [chunk.cuda() for chunk in chunks]
    if config.bf16 or config.fp16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    return chunks
