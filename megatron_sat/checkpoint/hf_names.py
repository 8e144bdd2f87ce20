"""Hugging Face's names and ours, in one table that import and export both read.

A `Row` says which of their tensors make one of Megatron's, and in which layout (`hf_layout.LAYOUTS`). `Features` say
which rows a model has. `POINTS` pairs the places at which the parity gate compares the two models. These are the
only places where Hugging Face's names of tensors and modules stand; `hf_config` has those of config.json.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

LAYER = "{layer}"
"""Stands for a layer's number in one of their names; Megatron stacks the layers of a tensor instead."""
TIED_HEAD = "lm_head.weight"
"""May stand beside the embedding in a file although the two are one tensor."""
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Endings of names that old files hold and no model reads: computed from the configuration."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Which tensors a model has beyond those that every Llama-like one has."""

    num_layers: int
    untied: bool = False
    """An output layer of its own."""
    qkv_bias: bool = False
    """Biases of query, key and value (Qwen2)."""
    linear_bias: bool = False
    """Biases of the other matrices of a layer."""
    qk_norm: bool = False
    """A norm of every head's query and key (Qwen3)."""

    def has(self, needs: str) -> bool:
        """Whether a row that ``needs`` a feature is there; "" is needed by none."""
        return not needs or bool(getattr(self, needs))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor of Megatron's (of every layer, where their names hold `LAYER`) and what it is made of."""

    megatron: str
    """Key in a distributed checkpoint."""
    theirs: tuple[str, ...]
    """In the order in which the layout joins them."""
    layout: str = "plain"
    """A key of `hf_layout.LAYOUTS`."""
    needs: str = ""
    """A feature's name, or "" for a tensor that every model has."""

    @property
    def per_layer(self) -> bool:
        return LAYER in self.theirs[0]

    def names(self, layer: int) -> list[str]:
        """Their names of the tensors of one layer; ``layer`` does not matter outside of the layers."""
        return [name.replace(LAYER, str(layer)) for name in self.theirs]


def _attention(part: str) -> str:
    return f"model.layers.{LAYER}.self_attn.{part}"


def _mlp(part: str) -> str:
    return f"model.layers.{LAYER}.mlp.{part}"


_OURS = "decoder.layers"
NAMES: tuple[Row, ...] = (
    Row(megatron="embedding.word_embeddings.weight", theirs=("model.embed_tokens.weight",), layout="vocabulary"),
    Row(
        megatron=f"{_OURS}.self_attention.linear_qkv.layer_norm_weight",
        theirs=(f"model.layers.{LAYER}.input_layernorm.weight",),
    ),
    Row(
        megatron=f"{_OURS}.self_attention.linear_qkv.weight",
        theirs=tuple(_attention(f"{part}_proj.weight") for part in "qkv"),
        layout="qkv",
    ),
    Row(
        megatron=f"{_OURS}.self_attention.linear_qkv.bias",
        theirs=tuple(_attention(f"{part}_proj.bias") for part in "qkv"),
        layout="qkv",
        needs="qkv_bias",
    ),
    Row(
        megatron=f"{_OURS}.self_attention.q_layernorm.weight",
        theirs=(_attention("q_norm.weight"),),
        needs="qk_norm",
    ),
    Row(
        megatron=f"{_OURS}.self_attention.k_layernorm.weight",
        theirs=(_attention("k_norm.weight"),),
        needs="qk_norm",
    ),
    Row(megatron=f"{_OURS}.self_attention.linear_proj.weight", theirs=(_attention("o_proj.weight"),)),
    Row(
        megatron=f"{_OURS}.self_attention.linear_proj.bias",
        theirs=(_attention("o_proj.bias"),),
        needs="linear_bias",
    ),
    Row(
        megatron=f"{_OURS}.mlp.linear_fc1.layer_norm_weight",
        theirs=(f"model.layers.{LAYER}.post_attention_layernorm.weight",),
    ),
    Row(
        megatron=f"{_OURS}.mlp.linear_fc1.weight",
        theirs=(_mlp("gate_proj.weight"), _mlp("up_proj.weight")),
        layout="gate_up",
    ),
    Row(
        megatron=f"{_OURS}.mlp.linear_fc1.bias",
        theirs=(_mlp("gate_proj.bias"), _mlp("up_proj.bias")),
        layout="gate_up",
        needs="linear_bias",
    ),
    Row(megatron=f"{_OURS}.mlp.linear_fc2.weight", theirs=(_mlp("down_proj.weight"),)),
    Row(megatron=f"{_OURS}.mlp.linear_fc2.bias", theirs=(_mlp("down_proj.bias"),), needs="linear_bias"),
    Row(megatron="decoder.final_layernorm.weight", theirs=("model.norm.weight",)),
    Row(megatron="output_layer.weight", theirs=(TIED_HEAD,), layout="vocabulary", needs="untied"),
)

EXTRA_STATES = tuple(
    f"{_OURS}.{module}._extra_state"
    for module in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
)
"""Objects (none of them holds anything) that Megatron's linear layers ask of a checkpoint, one a layer."""

POINTS: tuple[tuple[str, str, str], ...] = (
    ("embedding", "model.embed_tokens", "embedding"),
    ("layer {layer} attention", f"model.layers.{LAYER}.self_attn", f"{_OURS}.{LAYER}.self_attention"),
    ("layer {layer} MLP", f"model.layers.{LAYER}.mlp", f"{_OURS}.{LAYER}.mlp"),
    ("layer {layer}", f"model.layers.{LAYER}", f"{_OURS}.{LAYER}"),
    ("final norm", "model.norm", "decoder.final_layernorm"),
    ("logits", "lm_head", "output_layer"),
)
"""In the order of the computation: what the place is called, their module, Megatron's module."""


def rows(features: Features, *, table: Sequence[Row] = NAMES) -> list[Row]:
    """The rows that a model with these features has."""
    return [row for row in table if features.has(row.needs)]


def layers(row: Row, *, features: Features) -> range:
    """Layers of a row; one pass for a tensor outside of them."""
    return range(features.num_layers if row.per_layer else 1)


def expected(features: Features, *, table: Sequence[Row] = NAMES) -> Iterator[str]:
    """Every name that a Hugging Face model with these features has, in the order of the table."""
    for row in rows(features, table=table):
        for layer in layers(row, features=features):
            yield from row.names(layer)


def refuse_other_names(present: Iterable[str], *, features: Features, table: Sequence[Row] = NAMES) -> None:
    """Raise ValueError that lists every missing and every unexpected name of ``present``; buffers do not count."""
    wanted = dict.fromkeys(expected(features, table=table))
    has = {name for name in present if not name.endswith(BUFFERS)}
    if not features.untied:
        has.discard(TIED_HEAD)
    missing = [name for name in wanted if name not in has]
    unexpected = sorted(has - wanted.keys())
    if not missing and not unexpected:
        return
    lines = [f"\n  missing: {name}{_near(name, unexpected)}" for name in missing]
    lines += [f"\n  unexpected: {name}" for name in unexpected]
    raise ValueError(
        f"the tensors of a model must be those that its config.json asks for, {len(missing)} are missing and "
        f"{len(unexpected)} unexpected:{''.join(lines)}\ncheck config.json (biases, tied head, number of layers), or "
        "that the download is whole; nothing was written"
    )


def _near(name: str, others: list[str]) -> str:
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.9)
    return f" (is it {near[0]}?)" if near else ""
