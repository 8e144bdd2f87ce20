"""Which transformers models can be made sparse, and where their attentions, MLPs and linear layers are.

Llama (SmolLM2 is one), Mistral, Qwen2, Qwen3: one attention with q_proj, k_proj, v_proj, o_proj and one gated MLP with
gate_proj, up_proj, down_proj in every layer. Anything else is refused by name, before anything is changed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import Linear, Module

from megatron_sat.hf.cut import CutLinear
from megatron_sat.hf.neurons import SplitHeads
from megatron_sat.sparsity.neurons import Channels
from megatron_sat.sparsity.selector import SelectionConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""``config.model_type`` of the models that are known to fit."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Part:
    """An attention or MLP of one layer."""

    name: str
    """As ``model.named_modules()`` has it."""
    layer: int
    """From 1."""
    module: Module
    columns: tuple[Linear, ...]
    """q, k, v or gate, up."""
    row: Linear
    """o or down."""
    neurons: SplitHeads | Channels

    @property
    def kind(self) -> Literal["attention", "mlp"]:
        return "mlp" if isinstance(self.neurons, Channels) else "attention"

    def rows_of_each(self, index: Tensor) -> tuple[Tensor, ...]:
        """For each of ``columns`` its rows, counted from 0, that belong to the units ``index`` alone."""
        return (index, index) if isinstance(self.neurons, Channels) else self.neurons.rows_of_each(index)


def parts_of(model: Module, *, config: SelectionConfig) -> list[Part]:
    """Attention and MLP of every layer of a transformers model that omit neurons, in its order.

    Raises ValueError where no layer would, for a model of another family, and where a layer has been replaced (by peft
    or quantization, or by an earlier call).
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise ValueError(
            f"model must be a transformers model of the families {', '.join(FAMILIES)}, got {kind}; "
            "pass the model itself, not what wraps it"
        )
    layers = list(_layers(model))
    config.whole_layers(len(layers))  # refuses to leave none
    parts = [part for number, found in enumerate(layers, start=1) for part in _parts(found, number, config)]
    return [part for part in parts if config.omits(part.kind, layer=part.layer, num_layers=len(layers))]


def _layers(model: Module) -> Iterator[tuple[str, Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "self_attn") and hasattr(module, "mlp"):
            yield name, module


def _parts(found: tuple[str, Module], number: int, config: SelectionConfig) -> Iterator[Part]:
    name, layer = found
    attention: Any = layer.self_attn
    *qkv, proj = _linears(f"{name}.self_attn", attention, _ATTENTION)
    groups = qkv[1].out_features // attention.head_dim
    heads = SplitHeads(
        groups=groups,
        heads_per_group=qkv[0].out_features // attention.head_dim // groups,
        head_dim=attention.head_dim,
        whole_groups=config.gqa == "group",
    )
    yield Part(
        name=f"{name}.self_attn", layer=number, module=attention, columns=tuple(qkv), row=proj, neurons=heads
    )
    mlp: Any = layer.mlp
    *gate_up, down = _linears(f"{name}.mlp", mlp, _MLP)
    channels = Channels(units=down.in_features, gated=True, score_source=config.swiglu_score)
    yield Part(name=f"{name}.mlp", layer=number, module=mlp, columns=tuple(gate_up), row=down, neurons=channels)


def _linears(name: str, module: Module, wanted: tuple[str, ...]) -> list[Linear]:
    return [_plain(f"{name}.{one}", getattr(module, one, None)) for one in wanted]


def _plain(name: str, layer: Module | None) -> Linear:
    if isinstance(layer, CutLinear):
        raise ValueError(f"{name} must be dense, it is sparse already; call remove() of the first SparseModel before")
    if type(layer) is not Linear:
        raise ValueError(
            f"{name} must be a torch.nn.Linear, got {type(layer).__name__}; adapters and quantized layers compute with "
            "other weights: give sparsify the model without them"
        )
    if hasattr(layer.weight, "device_mesh"):
        raise ValueError(
            f"{name}.weight must lie on this rank, it is cut over others; load the model without tp_plan and FSDP, and "
            "train it with DDP or DeepSpeed's ZeRO"
        )
    return layer
