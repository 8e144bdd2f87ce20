"""Tiny transformers models of every family, batches for them, and the literal twin of a sparse one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_sat.hf.model import SparseModel, sparsify
from megatron_sat.sparsity.schedule import Schedule, ScheduleConfig, build_schedule, parse_rate
from megatron_sat.sparsity.selector import SelectionConfig

VOCAB, HEADS, GROUPS, HEAD_DIM, CHANNELS, LAYERS = 61, 8, 4, 6, 40, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-no-groups": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": HEADS}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}


def make_model(family: str = "llama", *, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """The same weights for the same arguments: large ones, so that scores differ; no norm or bias is at its start."""
    config, model, own = FAMILIES[family]
    torch.manual_seed(7)
    made: PreTrainedModel = model(config(**(SIZES | own | changes), attn_implementation=attention))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.train()


def make_batch(seed: int = 0, *, size: int = 2, length: int = 9) -> dict[str, Tensor]:
    """[size, length] of tokens, which are the labels too."""
    tokens = torch.randint(0, VOCAB, (size, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


def constant(rate: str, *, steps: int = 4) -> Schedule:
    """The same rate in every step."""
    return build_schedule(ScheduleConfig(kind="constant", omission_rate=parse_rate(rate), train_iters=steps))


def ladder(rate: str, *, steps: int, start: int, rungs: int) -> Schedule:
    """LORS."""
    return build_schedule(
        ScheduleConfig(kind="ladder", omission_rate=Fraction(rate), start=start, rungs=rungs, train_iters=steps)
    )


def make_sparse(model: Module, schedule: Schedule | None = None, **selection: Any) -> SparseModel:
    """Sparse at rate 1/2, where no schedule is given."""
    return sparsify(model, schedule=schedule or constant("1/2"), selection=SelectionConfig(**selection))


def gradients(model: Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient; who has none is missing."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model: Module, batches: list[dict[str, Tensor]]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the batches one after the other, and the sum of their gradients."""
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    return losses, gradients(model)


def blocks(model: Module) -> Iterator[tuple[str, Any, Any]]:
    """("attention.1", its module, its last linear layer), and so on, named as `Controller.kept` does."""
    for number, layer in enumerate(model.get_submodule("model.layers").children(), start=1):
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        yield f"attention.{number}", attention, attention.o_proj
        yield f"mlp.{number}", mlp, mlp.down_proj


@contextmanager
def zeroed(model: Module, kept: dict[str, Tensor], *, width: Callable[[str], int]) -> Iterator[None]:
    """The literal twin: a dense model in which what omitted neurons say is zero.

    kept: by block the units that stay; width: how many activations of the last layer's input belong to one unit.
    """

    def hook(units: Tensor, per_unit: int) -> Callable[[Module, tuple[Tensor]], tuple[Tensor]]:
        def silence(_: Module, args: tuple[Tensor]) -> tuple[Tensor]:
            mask = torch.zeros(args[0].size(-1) // per_unit)
            mask[units] = 1
            return (args[0] * mask.repeat_interleave(per_unit),)

        return silence

    handles = [
        row.register_forward_pre_hook(hook(kept[name], width(name))) for name, _, row in blocks(model) if name in kept
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def chosen(sparse: SparseModel) -> dict[str, Tensor]:
    """By block the units that stay in the step under way."""
    return {name: kept.index.clone() for name, kept in sparse.controller.kept().items() if kept is not None}
