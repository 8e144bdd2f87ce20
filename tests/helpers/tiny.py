"""A tiny Llama on the sparse layers, with weights and batches that do not depend on the parallel layout."""

import zlib
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_sat.distributed import Layout, initialize_model_parallel
from megatron_sat.layers.activation import tanh_gelu
from megatron_sat.model.builder import Embedding, build_chunks
from megatron_sat.sparsity.selector import Selector

VOCAB, SEQ = 128, 32


GPT2: dict[str, Any] = {
    "normalization": "LayerNorm",
    "gated_linear_unit": False,
    "activation_func": tanh_gelu,
    "add_bias_linear": True,
    "num_query_groups": 8,
}
"""Changes of `tiny_config` to GPT-2's layers; `GPT2_OUTSIDE` to what lies around them."""
GPT2_OUTSIDE: dict[str, Any] = {
    "position_embedding_type": "learned_absolute",
    "share_embeddings_and_output_weights": True,
}


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
    """This rank's chunks, filled by `fill`. What is a field of `Embedding` goes there."""
    outside = {name: changes.pop(name) for name in Embedding.__dataclass_fields__ if name in changes}
    embedding = Embedding(**{"padded_vocab_size": VOCAB, "max_sequence_length": SEQ} | outside)
    chunks = build_chunks(config or tiny_config(**changes), embedding)
    for chunk in chunks:
        fill(chunk)
    return chunks


def bare(chunk: nn.Module) -> GPTModel:
    """The GPTModel inside DDP and Float16Module."""
    while hasattr(chunk, "module"):
        chunk = cast(nn.Module, chunk.module)
    return cast(GPTModel, chunk)


def global_name(name: str, chunk: nn.Module) -> str:
    """``decoder.layers.<local>`` -> ``decoder.layers.<global>``."""
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        layer: Any = bare(chunk).decoder.layers[int(parts[at])]
        parts[at] = str(layer.layer_number - 1)
    return ".".join(parts)


@torch.no_grad()
def fill(chunk: nn.Module, *, std: float = 0.08) -> None:
    """The same whole weights in every layout: seeded by the global name, then cut to this rank's part."""
    model = bare(chunk)
    tp = ps.get_tensor_model_parallel_world_size()
    for name, parameter in model.named_parameters():
        dim = split_dim(parameter)
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] *= tp
        seed = global_name(name, model)
        if model.share_embeddings_and_output_weights:  # a tied head is the embedding of the first stage
            seed = seed.replace("output_layer", "embedding.word_embeddings")
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        whole = torch.randn(shape, generator=generator) * std
        if "norm" in name:
            whole += 1.0
        parameter.copy_(_shard(whole, name=name, dim=dim, gated=model.config.gated_linear_unit))


def split_dim(parameter: Any) -> int | None:
    """The dimension that tensor parallelism cuts; None: every TP rank holds the whole parameter."""
    tp = ps.get_tensor_model_parallel_world_size()
    return parameter.partition_dim if tp > 1 and getattr(parameter, "tensor_model_parallel", False) else None


def _shard(whole: Tensor, *, name: str, dim: int | None, gated: bool) -> Tensor:
    tp, rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
    if dim is None:
        return whole
    if gated and "linear_fc1" in name:  # gate | up: each half is cut
        return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
    return whole.chunk(tp, dim)[rank]


def _unshard(parts: list[Tensor], *, name: str, dim: int, gated: bool) -> Tensor:
    if gated and "linear_fc1" in name:
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(parts, dim)


def whole_gradients(chunk: nn.Module) -> dict[str, Tensor]:
    """By global name the gradients of a chunk, gathered over TP, after the sums of finalize_model_grads."""
    model, group = bare(chunk), ps.get_tensor_model_parallel_group()
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        dim = split_dim(parameter)
        if dim is not None:
            parts = [torch.empty_like(grad) for _ in range(group.size())]
            dist.all_gather(parts, grad.contiguous(), group=group)
            grad = _unshard(parts, name=name, dim=dim, gated=model.config.gated_linear_unit)
        elif getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name or "k_layernorm" in name:
            # what finalize_model_grads does with norms under SP and with QK-norm under TP
            dist.all_reduce(grad, group=group)
        found[global_name(name, model)] = grad.clone()
    return found


def whole_choices(selectors: list[Selector]) -> dict[str, list[int]]:
    """By "kind.layer" the units kept in the step under way, numbered over all TP ranks."""
    group = ps.get_tensor_model_parallel_group()
    found: dict[str, list[int]] = {}
    for selector in selectors:
        mine = selector.choice.index.tolist() if selector.choice else list(range(selector.neurons.units))
        parts: list[list[int]] = [[] for _ in range(group.size())]
        dist.all_gather_object(parts, mine, group=group)
        offsets = range(0, selector.neurons.units * group.size(), selector.neurons.units)
        found[f"{selector.place.kind}.{selector.place.layer}"] = [
            offset + unit for offset, part in zip(offsets, parts, strict=True) for unit in part
        ]
    return found


def batch(step: int, size: int, *, seq: int = SEQ) -> tuple[Tensor, Tensor]:
    """tokens and labels [size, seq], the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, VOCAB, (size, seq + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def positions(size: int, *, seq: int = SEQ) -> Tensor:
    return torch.arange(seq).expand(size, -1).contiguous()


def losses(chunk: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Per-token losses [b, s] of a model without pipeline."""
    found: Tensor = chunk(tokens, positions(len(tokens)), None, labels=labels)
    return found
