"""A tiny Llama on the sparse layers, with weights and batches that do not depend on the parallel layout."""

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_sat.distributed import Layout, initialize_model_parallel
from megatron_sat.model.builder import Embedding, build_chunks

VOCAB, SEQ = 128, 32


def layout(*, tp: int = 1, pp: int = 1, cp: int = 1, virtual_pp: int | None = None) -> Layout:
    """Megatron's groups over the ranks at hand."""
    return initialize_model_parallel(tp=tp, pp=pp, cp=cp, virtual_pp=virtual_pp, seed=1234)


def tiny_config(**changes: Any) -> TransformerConfig:
    """4 layers, hidden 64, 8 heads in 4 groups, 96 channels; parallel sizes as they are in this process."""
    fields: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 96,
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
        "tensor_model_parallel_size": ps.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": ps.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": ps.get_virtual_pipeline_model_parallel_world_size(),
        "context_parallel_size": ps.get_context_parallel_world_size(),
    }
    return TransformerConfig(**fields | changes)


def tiny_chunks(config: TransformerConfig | None = None, **changes: Any) -> list[nn.Module]:
    """This rank's chunks, filled by `fill`. ``share_embeddings_and_output_weights`` goes to the embedding."""
    tied = changes.pop("share_embeddings_and_output_weights", False)
    embedding = Embedding(
        padded_vocab_size=VOCAB, max_sequence_length=SEQ, share_embeddings_and_output_weights=tied
    )
    chunks = build_chunks(config or tiny_config(**changes), embedding)
    for chunk in chunks:
        fill(chunk)
    return chunks


def bare(chunk: nn.Module) -> nn.Module:
    """The GPTModel inside DDP and Float16Module."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def global_name(name: str, chunk: nn.Module) -> str:
    """``decoder.layers.<local>`` -> ``decoder.layers.<global>``."""
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(bare(chunk).decoder.layers[int(parts[at])].layer_number - 1)
    return ".".join(parts)


@torch.no_grad()
def fill(chunk: nn.Module, *, std: float = 0.08) -> None:
    """The same whole weights in every layout: seeded by the global name, then cut to this rank's part."""
    chunk = bare(chunk)
    tp, rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
    for name, parameter in chunk.named_parameters():
        dim = parameter.partition_dim if tp > 1 and getattr(parameter, "tensor_model_parallel", False) else -1
        shape = list(parameter.shape)
        if dim >= 0:
            shape[dim] *= tp
        # a tied head of the last stage is the embedding of the first
        seed = global_name(name, chunk).replace("output_layer", "embedding.word_embeddings") if _tied(chunk) else global_name(name, chunk)
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        whole = torch.randn(shape, generator=generator) * std
        if "norm" in name:
            whole += 1.0
        parameter.copy_(_shard(whole, name=name, dim=dim, tp=tp, rank=rank))


def _tied(chunk: nn.Module) -> bool:
    return bool(getattr(chunk, "share_embeddings_and_output_weights", False))


def _shard(whole: Tensor, *, name: str, dim: int, tp: int, rank: int) -> Tensor:
    if dim < 0:
        return whole
    if "linear_fc1" in name:  # gate | up: each half is cut
        gate, up = whole.chunk(2, 0)
        return torch.cat([gate.chunk(tp, 0)[rank], up.chunk(tp, 0)[rank]], 0)
    return whole.chunk(tp, dim)[rank]


def batch(step: int, size: int, *, seq: int = SEQ) -> tuple[Tensor, Tensor]:
    """tokens and labels [size, seq], the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB, (size, seq + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def positions(size: int, *, seq: int = SEQ) -> Tensor:
    return torch.arange(seq).expand(size, -1).contiguous()


def losses(chunk: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Per-token losses [b, s] of a model without pipeline."""
    return chunk(tokens, positions(len(tokens)), None, labels=labels)
