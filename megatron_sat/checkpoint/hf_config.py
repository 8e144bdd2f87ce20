"""Hugging Face's config.json and our settings, in both directions.

`settings_of` reads the configuration of a Llama-like model (`FAMILIES`) into Megatron-LM's flags by key; what we cannot
compute exactly as transformers does is refused, with the field, its value and the way out. `config_of` writes the
configuration of a model that never had one. What both know of a field stands in `FIELDS`, once. A configuration is
handed in as `hf_model.read_config` gives it: every default filled in by transformers itself.

Precision is no part of it: a run chooses its own (--bf16), whatever the weights were saved in.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_sat.checkpoint.hf_layout import Dimensions
from megatron_sat.checkpoint.hf_names import Features

Values = Mapping[str, Any]

CONFIG = "config.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of model_type. TinyLlama and SmolLM2 are llama; Qwen2.5 is qwen2."""
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FIELDS: Mapping[str, str] = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
}
"""Fields that mean the same on both sides; all are required."""
_FIXED: Mapping[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
"""What every model of the families is."""
MODEL_KEYS = (
    *FIELDS.values(),
    *_FIXED,
    *"group_query_attention num_query_groups kv_channels add_bias_linear add_qkv_bias qk_layernorm".split(),
    *"untie_embeddings_and_output_weights padded_vocab_size rotary_base rotary_percent rotary_interleaved".split(),
    *"use_rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor".split(),
    *"squared_relu quick_geglu openai_gelu".split(),
)
"""Settings that say what a model is; a run adds how it is trained."""
_OF_THE_RUN = ("attention_dropout", "hidden_dropout", "max_position_embeddings")
"""Those in which a run may depart from what the model came with."""
LLAMA3_SCALING: Mapping[str, float] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of Llama 3's rotary scaling megatron.core takes the factor alone; these are written into its code."""


def settings_of(config: Values, *, padded_vocab_size: int) -> dict[str, Any]:
    """The model's settings by key, those of ``--config FILE.yaml``. Raises ValueError for what we cannot compute.

    padded_vocab_size: rows of the embedding, see `padded`.
    """
    _refuse_unknown(config)
    settings: dict[str, Any] = {ours: _required(config, name) for name, ours in FIELDS.items()} | dict(_FIXED)
    heads = settings["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if groups != heads:
        settings |= {"group_query_attention": True, "num_query_groups": groups}
    features = features_of(config)
    return (
        settings
        | {"kv_channels": config.get("head_dim") or settings["hidden_size"] // heads}
        | _rotary(config)
        | {
            "add_bias_linear": features.linear_bias,
            "add_qkv_bias": features.qkv_bias,
            "qk_layernorm": features.qk_norm,
            "untie_embeddings_and_output_weights": features.untied,
            "padded_vocab_size": padded_vocab_size,
        }
    )


def features_of(config: Values) -> Features:
    """Which tensors the model has. Raises ValueError for biases that Megatron's layers cannot have."""
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention != mlp:  # llama: of q, k, v and o; Megatron has o's with the MLP's or not at all
        raise ValueError(
            f"attention_bias and mlp_bias must be both on or both off, got {attention} and {mlp}: Megatron has one "
            "switch for the biases of o_proj and of the MLP; write zeros for the missing ones"
        )
    return Features(
        num_layers=_required(config, "num_hidden_layers"),
        untied=not config.get("tie_word_embeddings"),
        qkv_bias=config.get("model_type") == "qwen2" or attention,
        linear_bias=attention,
        qk_norm=config.get("model_type") == "qwen3",
    )


def dimensions_of(config: Values, *, padded_vocab_size: int) -> Dimensions:
    """What the layouts need."""
    heads = _required(config, "num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    return Dimensions(
        num_query_groups=groups,
        heads_per_group=heads // groups,
        head_dim=config.get("head_dim") or _required(config, "hidden_size") // heads,
        vocab_size=_required(config, "vocab_size"),
        padded_vocab_size=padded_vocab_size,
    )


def config_of(settings: Values, *, vocab_size: int) -> dict[str, Any]:
    """A config.json for a model that was trained from these settings and never had one.

    Raises ValueError for settings that no family has.
    """
    refuse_unlike(settings)
    biased, qkv_bias = bool(settings.get("add_bias_linear")), bool(settings.get("add_qkv_bias"))
    norms = bool(settings.get("qk_layernorm"))
    if norms and (biased or qkv_bias):
        raise ValueError("a model with --qk-layernorm can be exported without biases alone, got both; no family has it")
    if settings.get("rotary_percent", 1.0) != 1.0 or settings.get("rotary_interleaved"):
        raise ValueError(
            f"rotary_percent and rotary_interleaved of an exported model must be 1 and off, got "
            f"{settings.get('rotary_percent')} and {settings.get('rotary_interleaved')}; no family has it"
        )
    family = "qwen3" if norms else "qwen2" if qkv_bias and not biased else "llama"
    heads = settings["num_attention_heads"]
    grouped = settings.get("group_query_attention")
    return {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        **{theirs: settings[ours] for theirs, ours in FIELDS.items()},
        "num_key_value_heads": settings["num_query_groups"] if grouped else heads,
        "head_dim": settings.get("kv_channels") or settings["hidden_size"] // heads,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "tie_word_embeddings": not settings.get("untie_embeddings_and_output_weights"),
        "rope_parameters": _rope_parameters(settings),
        **({"attention_bias": True, "mlp_bias": True} if biased else {}),
    }


def refuse_unlike(settings: Values) -> None:
    """Raise ValueError for a model that is none of `FAMILIES`, such as GPT-2."""
    for key, value in _FIXED.items():
        if key not in _OF_THE_RUN and settings.get(key) != value:
            raise ValueError(
                f"{key} of an exported model must be {value}, got {settings.get(key)}: only {', '.join(FAMILIES)} can "
                "be exported; evaluate the checkpoint itself (tools/evaluate.py), or train a Llama-like model"
            )


def differences(config: Values, *, settings: Values) -> list[str]:
    """One line for each setting in which a configuration describes another model than ``settings``."""
    wanted = settings_of(config, padded_vocab_size=settings["padded_vocab_size"])
    unsaid: dict[str, Any] = {
        "num_query_groups": settings["num_attention_heads"],
        "kv_channels": settings["hidden_size"] // settings["num_attention_heads"],
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "rope_scaling_factor": wanted.get("rope_scaling_factor"),  # counts with use_rope_scaling alone
    }
    lines = []
    for key in (key for key in MODEL_KEYS if key not in _OF_THE_RUN):
        theirs, ours = (said.get(key, unsaid.get(key)) for said in (wanted, settings))
        if (theirs or None) != (ours or None) and not (key == "rope_scaling_factor" and theirs is None):
            lines.append(f"{key}: {theirs} by config.json, {ours} in the checkpoint")
    return lines


def padded(vocab_size: int, *, divisible_by: int, tp: int) -> int:
    """Rows of Megatron's embedding: ``vocab_size`` rounded up to a multiple of ``divisible_by * tp``."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


def _required(config: Values, name: str) -> Any:
    if config.get(name) is None:
        raise ValueError(f"{CONFIG} must have {name}, it has not; fetch the model again")
    return config[name]


def _refuse_unknown(config: Values) -> None:
    """Raise ValueError for whatever would make transformers compute something else than we do."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {family}; choose a Llama-like model")
    longest = _required(config, "max_position_embeddings")
    window = config.get("sliding_window")
    slides = window is not None and window < longest and (family == "mistral" or bool(config.get("use_sliding_window")))
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if slides or kinds:
        raise ValueError(
            f"every token must attend to all before it, got sliding_window {window} (layer_types: "
            f"{', '.join(sorted(kinds)) or 'none'}); for texts of up to {window} tokens the window does nothing: set "
            f"max_position_embeddings of {CONFIG} to {window} and sliding_window to null"
        )
    checks: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("hidden_act", lambda value: value in (None, "silu", "swish"), "must be silu"),
        ("quantization_config", lambda value: value is None, "must be absent: import the weights before quantization"),
        ("attention_dropout", lambda value: not value, "must be 0; dropout is a flag of the run"),
    )
    for name, fits, rule in checks:
        if not fits(config.get(name)):
            raise ValueError(f"{name} of {CONFIG} {rule}, got {config.get(name)}; choose another model")


def _rotary(config: Values) -> dict[str, Any]:
    rope = _required(config, "rope_parameters")  # transformers 5 reads rope_theta and rope_scaling into it
    base, kind = _required(rope, "rope_theta"), rope.get("rope_type", "default")
    share = rope.get("partial_rotary_factor", 1.0)
    if base != int(base) or share != 1.0:
        raise ValueError(
            f"rope_theta must be a whole number and partial_rotary_factor 1, got {base} and {share}; "
            "choose another model"
        )
    settings: dict[str, Any] = {"rotary_base": int(base), "rotary_percent": 1.0}
    if kind == "default":
        return settings
    factor = rope.get("factor")
    if kind == "linear" and factor == int(factor):
        return settings | {"rotary_seq_len_interpolation_factor": int(factor)}
    if kind == "llama3":
        other = {name: rope.get(name) for name, value in LLAMA3_SCALING.items() if rope.get(name) != value}
        if other:
            raise ValueError(
                f"rope_scaling of type llama3 must have {dict(LLAMA3_SCALING)}, which megatron.core has built in, got "
                f"{other}; choose another model"
            )
        return settings | {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}
    raise ValueError(
        f"rope_scaling must be absent, llama3, or linear by a whole factor, got {kind} by {factor}; choose another "
        "model"
    )


def _rope_parameters(settings: Values) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(settings.get("rotary_base", 10000))}
    factor = settings.get("rotary_seq_len_interpolation_factor")
    if settings.get("use_rope_scaling"):
        return rope | {"rope_type": "llama3", "factor": settings["rope_scaling_factor"], **LLAMA3_SCALING}
    return rope | ({"rope_type": "linear", "factor": float(factor)} if factor else {"rope_type": "default"})
