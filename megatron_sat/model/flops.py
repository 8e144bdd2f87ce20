"""Floating-point operations of a training step of a Llama-like model or GPT-2, whole or with neurons left out.

Counted are the matrix products, two operations a multiply-add: QKV, O, gate, up, down, attention scores and
values, logits; a backward is two forwards. Not counted: embedding look-up, norms, biases, softmax, positions,
optimizer, and what a fused attention kernel computes twice for itself. Sums are over all ranks, and exact.

Attention is counted causally: a token attends to (s + 1) / 2 tokens on average, itself included, which is
what flash kernels compute (Megatron-LM's log says s / 2). ``causal=False`` counts all s, as unfused kernels
do and torch's counter.
"""

from dataclasses import dataclass
from fractions import Fraction

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sat.sparsity.selection import keep_count

RECOMPUTABLE = ("full", "core_attn", "mlp", "layernorm")
"""What `Recompute` can name: a whole layer, or modules of Megatron's ``--recompute-modules``."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the cost of a model depends on; whole numbers, at least 1, over all ranks."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Divides the heads; equal to them without grouped queries."""
    kv_channels: int
    """d, the size of one head."""
    ffn_hidden_size: int
    gated: bool
    """SwiGLU: three matrices an MLP. Otherwise two."""
    padded_vocab_size: int
    seq_length: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "gated" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; give the model's own")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_query_groups ({self.num_query_groups}) must divide num_attention_heads "
                f"({self.num_attention_heads}); give the model's own"
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a key and a value."""
        return self.num_attention_heads // self.num_query_groups


@dataclass(frozen=True, kw_only=True)
class KeptShape:
    """What each layer computes in a step, over all ranks."""

    heads: int
    """Query heads."""
    groups: int
    """Query groups: keys and values."""
    channels: int
    """MLP channels."""
    whole_layers: int = 0
    """Layers beside these that compute everything."""
    layers_left_out: int = 0
    """Layers beside these that compute nothing."""
    omit: str = "both"
    """What is of these neurons alone, of `sparsity.settings.PASSES`: both passes, backwards, weight gradients."""


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Which forwards run a second time during the backward."""

    parts: tuple[str, ...] = ()
    """("full",) for ``--recompute-granularity full``, else the ``--recompute-modules``; () for none."""
    layers: int | None = None
    """How many layers of the model that concerns; None: all."""

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in RECOMPUTABLE]
        if unknown:
            raise ValueError(
                f"--recompute-modules must be among {', '.join(RECOMPUTABLE[1:])}, got {', '.join(unknown)}; "
                "a Llama-like model has no others"
            )


NO_RECOMPUTE = Recompute()


def shape_of(config: TransformerConfig, *, padded_vocab_size: int, seq_length: int) -> ModelShape:
    """The shape of the model that ``config`` describes."""
    heads = config.num_attention_heads
    return ModelShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        num_query_groups=config.num_query_groups or heads,
        kv_channels=config.kv_channels or config.hidden_size // heads,
        ffn_hidden_size=config.ffn_hidden_size or 4 * config.hidden_size,
        gated=config.gated_linear_unit,
        padded_vocab_size=padded_vocab_size,
        seq_length=seq_length,
    )


def whole(shape: ModelShape) -> KeptShape:
    """Every neuron."""
    return KeptShape(
        heads=shape.num_attention_heads, groups=shape.num_query_groups, channels=shape.ffn_hidden_size
    )


def kept_shape(
    shape: ModelShape,
    rate: Fraction,
    *,
    selection_groups: int,
    channel_multiple: int,
    gqa: str,
    modules: str = "all",
    whole_layers: int = 0,
    omit: str = "both",
) -> KeptShape:
    """What stays of each layer at omission ``rate``, by the selectors' quotas (`selection.keep_count`).

    gqa: "group", whole query groups leave; "head", heads leave within every group, all keys and values stay.
    modules: attention or mlp where these alone omit anything. whole_layers: that omit nothing. omit: of `KeptShape`.
    Raises ValueError where selection groups do not divide the channels, or the query groups that leave
    whole.
    """
    heads, groups, channels = shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size
    if modules != "attention":
        channels = _quota(channels, rate, selection_groups, noun="channels", multiple=channel_multiple)
    if modules != "mlp" and gqa == "head":
        heads = groups * keep_count(shape.heads_per_group, rate)
    elif modules != "mlp":
        groups = _quota(groups, rate, selection_groups, noun="query groups")
        heads = groups * shape.heads_per_group
    return KeptShape(
        heads=heads,
        groups=groups,
        channels=channels,
        whole_layers=whole_layers if rate else 0,
        omit=omit if rate else "both",
    )


def _quota(total: int, rate: Fraction, selection_groups: int, *, noun: str, multiple: int = 1) -> int:
    if total % selection_groups:
        raise ValueError(
            f"--sat-selection-groups ({selection_groups}) must divide the {noun} ({total}); "
            "try the tensor-parallel size"
        )
    return selection_groups * keep_count(total // selection_groups, rate, multiple=multiple)


def step_flops(
    shape: ModelShape,
    kept: KeptShape,
    *,
    tokens: int,
    recompute: Recompute = NO_RECOMPUTE,
    causal: bool = True,
) -> int:
    """Operations of a forward and backward over ``tokens`` tokens in which each layer computes ``kept``.

    With ``recompute`` it is what the machine executes; where that concerns some layers, they are taken for mean ones.
    The dense equivalent, by which models are compared, is ``step_flops(shape, whole(shape), tokens=tokens)``.
    """
    logits = 2 * shape.hidden_size * shape.padded_vocab_size
    total = again = 0
    sparse = shape.num_layers - kept.whole_layers - kept.layers_left_out
    for layers, each in ((sparse, kept), (kept.whole_layers, whole(shape))):
        kept_parts, dense = (layer_forward_flops(shape, each_kept, causal=causal) for each_kept in (each, whole(shape)))
        parts = kept_parts if each.omit == "both" else dense
        to_inputs = dense if each.omit == "weight-gradient" else kept_parts
        to_weights = kept_parts | {"core_attn": to_inputs["core_attn"]}  # it has none: both products are of inputs
        total += layers * sum(sum(products.values()) for products in (parts, to_inputs, to_weights))
        named = parts if "full" in recompute.parts else recompute.parts
        again += layers * sum(parts.get(part, 0) for part in named)
    recomputed = shape.num_layers if recompute.layers is None else recompute.layers
    return tokens * (total + 3 * logits + again * recomputed // shape.num_layers)


def hybrid_share(length: int, *, stride: int) -> Fraction:
    """What local ∪ strided attention (`core_attention.hybrid_mask`) attends to, over what causal attention does."""
    attended = sum(min(place + 1, stride) + place // stride for place in range(length))
    return Fraction(attended, length * (length + 1) // 2)


def masked_step_flops(
    shape: ModelShape, *, density: Fraction, tokens: int, attended: Fraction = Fraction(1)
) -> Fraction:
    """Operations of a step in which ``density`` of each layer's weights takes part, single ones, as methods of masks
    count them: every product with a weight costs its share. attended: share of causal attention. Logits are those of a
    dense step, and nothing is recomputed."""
    parts = layer_forward_flops(shape, whole(shape))
    weights = sum(flops for name, flops in parts.items() if name != "core_attn")
    logits = 2 * shape.hidden_size * shape.padded_vocab_size
    return 3 * tokens * (shape.num_layers * (density * weights + attended * parts["core_attn"]) + logits)


def layer_forward_flops(shape: ModelShape, kept: KeptShape, *, causal: bool = True) -> dict[str, int]:
    """Operations a token of one layer's forward: "qkv", "core_attn" (scores and values), "proj", "mlp"."""
    attended_twice = shape.seq_length + 1 if causal else 2 * shape.seq_length
    into, out_of = kept.heads + 2 * kept.groups, kept.heads
    return {
        "qkv": 2 * shape.hidden_size * shape.kv_channels * into,
        "core_attn": 2 * shape.kv_channels * kept.heads * attended_twice,
        "proj": 2 * shape.hidden_size * shape.kv_channels * out_of,
        "mlp": (3 if shape.gated else 2) * 2 * shape.hidden_size * kept.channels,
    }


def choice_flops(
    shape: ModelShape, *, importance: str, tokens: int, replicas: int = 1, modules: str = "all", whole_layers: int = 0
) -> int:
    """Operations of scoring every neuron of every sparse layer once, and measuring the ``tokens`` that it takes.

    importance: a key of `sparsity.importance.METRICS`. tokens: of one replica's first micro-batch. replicas:
    data-parallel ones; each measures and scores for itself. They come on top of the step's own operations,
    and elementwise ones are among them; picking the best scores costs nothing that counts.
    """
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    forward = layer_forward_flops(shape, whole(shape))
    # rows of the first weight, columns of the second, operations up to the last product
    attention = (heads + 2 * shape.num_query_groups) * shape.kv_channels, heads * shape.kv_channels
    mlp = (2 if shape.gated else 1) * shape.ffn_hidden_size, shape.ffn_hidden_size
    looked_at = {
        "attention": (*attention, forward["qkv"] + forward["core_attn"]),
        "mlp": (*mlp, forward["mlp"] - 2 * hidden * shape.ffn_hidden_size),
    }
    per_layer = 0
    for kind, (rows, columns, before) in looked_at.items():
        per_layer += (modules in ("all", kind)) * {
            "uniform": 0,
            "magnitude": 2 * hidden * rows,
            "wanda": 2 * hidden * rows + 2 * hidden * tokens,  # squares and sums of the module's input
            "maxip": 2 * hidden * rows + hidden * tokens,
            "contribution": 2 * hidden * columns + 2 * columns * tokens + tokens * before,
        }[importance]
    return replicas * (shape.num_layers - whole_layers) * per_layer
