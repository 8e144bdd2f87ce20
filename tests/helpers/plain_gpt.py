"""A tiny dense Llama-like GPTModel of plain megatron.core, and batches for it: weights and data do not depend
on the layout."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

VOCAB, SEQ, MICRO = 96, 16, 2


class Norm(torch.nn.RMSNorm):
    """RMSNorm that sequence parallelism accepts; megatron.core's local one refuses it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def make_config(**changes: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "use_cpu_initialization": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "pipeline_dtype": torch.float32,
        "calculate_per_token_loss": True,
        "tensor_model_parallel_size": ps.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": ps.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": ps.get_virtual_pipeline_model_parallel_world_size(),
        "context_parallel_size": ps.get_context_parallel_world_size(),
    }
    return TransformerConfig(**{**settings, **changes})


def make_chunks(
    config: TransformerConfig, *, tied: bool = False, vocab: int = VOCAB
) -> list[torch.nn.Module]:
    """This rank's model chunks, filled with weights that any layout would give them."""
    virtual = config.virtual_pipeline_model_parallel_size
    chunks: list[torch.nn.Module] = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        count = get_num_layers_to_build(config, vp_stage=vp_stage)
        model = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm),
            vocab_size=vocab,
            max_sequence_length=SEQ,
            pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=tied,
            vp_stage=vp_stage,
        )
        fill(model)
        chunks.append(Float16Module(config, model) if config.bf16 or config.fp16 else model)
    return chunks


def global_name(name: str, *, model: torch.nn.Module) -> str:
    """decoder.layers.<local>. to decoder.layers.<global>., and one name for both ends of tied embeddings."""
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(model.decoder.layers[int(parts[at])].layer_number - 1)
    joined = ".".join(parts)
    tied = model.share_embeddings_and_output_weights
    return "embedding.word_embeddings.weight" if tied and joined == "output_layer.weight" else joined


@torch.no_grad()
def fill(model: torch.nn.Module, *, std: float = 0.08) -> None:
    """Weights drawn for the whole model from a parameter's global name; each rank takes its part."""
    size, rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
            continue
        dim = getattr(parameter, "partition_dim", -1) if size > 1 else -1
        shape = list(parameter.shape)
        if dim >= 0:
            shape[dim] *= size
        generator = torch.Generator().manual_seed(zlib.crc32(global_name(name, model=model).encode()))
        whole = torch.randn(shape, generator=generator) * std
        if dim < 0:
            parameter.copy_(whole)
        elif "linear_fc1" in name:  # [gate | up]: each half is cut
            halves = whole.chunk(2)
            parameter.copy_(torch.cat([half.chunk(size)[rank] for half in halves]))
        else:
            parameter.copy_(whole.chunk(size, dim)[rank])


def make_batches(
    step: int, *, total: int, ranks: int = 1, rank: int = 0, masked: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of one data-parallel rank out of a global batch of `total` micro-batches of this step.

    With `masked` every sequence has another number of unmasked tokens: means of means would differ.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB, (total, MICRO, SEQ + 1), generator=generator)
    lengths = torch.randint(3, SEQ + 1, (total, MICRO, 1), generator=generator)
    mask = (torch.arange(SEQ) < lengths).float() if masked else torch.ones(total, MICRO, SEQ)
    causal = torch.triu(torch.ones(1, 1, SEQ, SEQ), 1).bool()
    for index in range(rank, total, ranks):
        yield {
            "tokens": tokens[index, :, :-1].contiguous(),
            "labels": tokens[index, :, 1:].contiguous(),
            "loss_mask": mask[index],
            "position_ids": torch.arange(SEQ).expand(MICRO, -1),
            "attention_mask": causal,
        }
