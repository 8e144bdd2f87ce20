"""config.json and settings, both ways, and every model that is refused."""

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import AutoConfig

from megatron_sat.checkpoint.hf_config import (
    LLAMA3_SCALING,
    MODEL_KEYS,
    config_of,
    differences,
    dimensions_of,
    features_of,
    padded,
    settings_of,
)
from megatron_sat.flags.table import table
from tests.checkpoint.families import FAMILIES


def _config(family: str = "llama-3", **changes: Any) -> dict[str, Any]:
    return FAMILIES[family]().to_dict() | changes


def _rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": _config()["rope_parameters"] | changes}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_written_as_a_config_give_the_same_settings(family):
    settings = settings_of(_config(family), padded_vocab_size=512)
    written = AutoConfig.for_model(**config_of(settings, vocab_size=300)).to_dict()

    assert settings_of(written, padded_vocab_size=512) == settings
    assert features_of(written) == features_of(_config(family))
    assert differences(written, settings=settings) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_a_model_is_a_flag_and_among_the_models_keys(family):
    settings = settings_of(_config(family), padded_vocab_size=512)
    assert settings.keys() <= set(MODEL_KEYS)
    assert set(MODEL_KEYS) <= {flag.key for flag in table().working}


def test_qwen3_has_norms_of_heads_and_heads_of_their_own_size():
    settings = settings_of(_config("qwen3"), padded_vocab_size=300)
    assert settings["qk_layernorm"] and settings["kv_channels"] == 16 and not settings["add_qkv_bias"]
    assert settings["rotary_base"] == 1_000_000
    assert dimensions_of(_config("qwen3"), padded_vocab_size=300).head_dim == 16


def test_llama3_scaling_keeps_its_factor():
    settings = settings_of(_config(**_rope(factor=32.0)), padded_vocab_size=300)
    assert settings["use_rope_scaling"] and settings["rope_scaling_factor"] == 32.0


def test_megatron_scales_rotary_frequencies_by_the_constants_that_are_asked_for():
    common = {"kv_channels": 64, "rotary_percent": 1.0, "rotary_base": 500000}
    rope = RotaryEmbedding(**common, rope_scaling=True, rope_scaling_factor=8.0)
    plain = RotaryEmbedding(**common).inv_freq
    low, high, old = (LLAMA3_SCALING[name] for name in LLAMA3_SCALING)
    for index, frequency in enumerate(plain.tolist()):
        length = 2 * torch.pi / frequency
        share = min(max((old / length - low) / (high - low), 0.0), 1.0)
        wanted = (1 - share) * frequency / 8.0 + share * frequency
        assert rope.inv_freq[index].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"model_type": "gemma2"}, "model_type must be one of llama, mistral, qwen2, qwen3, got gemma2"),
        ({"hidden_act": "gelu"}, "hidden_act of config.json must be silu, got gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config of config.json must be absent"),
        ({"attention_dropout": 0.1}, "attention_dropout of config.json must be 0"),
        ({"attention_bias": True}, "attention_bias and mlp_bias must be both on or both off, got True and False"),
        ({"model_type": "mistral", "sliding_window": 128}, "got sliding_window 128 .* sliding_window to null"),
        (
            {"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True},
            "every token must attend to all before it",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: sliding_attention"),
        ({"num_hidden_layers": None}, "config.json must have num_hidden_layers"),
        (_rope(low_freq_factor=2.0), "of type llama3 must have .*, got {'low_freq_factor': 2.0}"),
        (_rope(original_max_position_embeddings=4096), "got {'original_max_position_embeddings': 4096}"),
        (_rope(rope_type="yarn"), "rope_scaling must be absent, llama3, or linear by a whole factor, got yarn"),
        (_rope(rope_type="linear", factor=1.5), "linear by a whole factor, got linear by 1.5"),
        (_rope(rope_theta=10000.5), "rope_theta must be a whole number"),
        (_rope(partial_rotary_factor=0.5), "partial_rotary_factor 1, got 500000.0 and 0.5"),
    ],
)
def test_a_model_that_we_would_compute_otherwise_is_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        settings_of(_config(**changes), padded_vocab_size=512)


def test_a_window_that_no_text_reaches_is_none():
    assert settings_of(_config("mistral", sliding_window=512), padded_vocab_size=4096)
    assert settings_of(_config("qwen2", sliding_window=128, use_sliding_window=False), padded_vocab_size=300)


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"swiglu": False},
            r"swiglu of an exported model must be True, got False: only llama, .* evaluate .*\(tools/evaluate.py\), or",
        ),
        ({"normalization": "LayerNorm"}, "normalization of an exported model must be RMSNorm, got LayerNorm: only"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type of an exported model must be rope"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "a model with --qk-layernorm can be exported without biases"),
        ({"rotary_interleaved": True}, "rotary_percent and rotary_interleaved of an exported model must be 1 and off"),
    ],
)
def test_settings_that_no_family_has_are_not_exported(changes, text):
    settings = settings_of(_config(), padded_vocab_size=512) | changes
    with pytest.raises(ValueError, match=text):
        config_of(settings, vocab_size=300)


def test_differences_name_each_setting():
    settings = settings_of(_config(), padded_vocab_size=512)
    other = _config(intermediate_size=64, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    lines = differences(other, settings=settings)
    assert "ffn_hidden_size: 64 by config.json, 48 in the checkpoint" in lines
    assert any(line.startswith("rotary_base: 10000") for line in lines)
    assert any(line.startswith("use_rope_scaling") for line in lines)


def test_a_vocabulary_is_padded_to_the_next_multiple():
    assert [padded(size, divisible_by=128, tp=2) for size in (1, 256, 257)] == [256, 256, 512]
