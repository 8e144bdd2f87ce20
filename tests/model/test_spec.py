"""Wall 1: our model is Megatron's GPTModel by name, shape and checkpoint key; the rest is refused."""

from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from megatron_sat.layers.core_attention import SDPACoreAttention
from megatron_sat.model.spec import core_attention_for, norm_for, sparse_layer_spec
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import GPT2, GPT2_OUTSIDE, SEQ, VOCAB, bare, batch, layout, losses, tiny_chunks, tiny_config
from tests.helpers.tolerances import FP32_SUMS

MODELS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_qkv_bias": True},
        {"qk_layernorm": True},
        {"add_bias_linear": True},
        {"gated_linear_unit": False},
        GPT2 | GPT2_OUTSIDE,
    ],
    ids=["llama", "qwen2", "qwen3", "bias", "no-gate", "gpt2"],
)


def megatrons(**changes: Any) -> GPTModel:
    """Plain Megatron, without anything of ours."""
    outside = {"position_embedding_type": "rope"} | {k: v for k, v in changes.items() if k in GPT2_OUTSIDE}
    config = tiny_config(**{k: v for k, v in changes.items() if k not in GPT2_OUTSIDE})
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm),
        vocab_size=VOCAB,
        max_sequence_length=SEQ,
        **outside,
    )


def describe(name: str, item: Any) -> tuple[Any, ...]:
    """What decides where an entry of a distributed checkpoint lies and what it is."""
    if isinstance(item, ShardedTensorFactory):
        return name, item.key, [describe(part.key, part) for part in item.build()]
    if isinstance(item, ShardedObject):
        return name, item.key, item.global_shape, item.global_offset
    assert isinstance(item, ShardedTensor)
    return name, item.key, item.local_shape, item.global_shape, item.global_offset, item.dtype


def contents(_: int, tp: int, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Of our model and of Megatron's: parameters, state, and what a distributed checkpoint would hold."""
    layout(tp=tp)
    found = []
    for model in (bare(tiny_chunks(**changes)[0]), megatrons(**changes)):
        sharded = model.sharded_state_dict()
        found.append(
            {
                "parameters": [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()],
                "state": list(model.state_dict()),
                "sharded": sorted(describe(name, item) for name, item in sharded.items()),
            }
        )
    return found


@MODELS
@pytest.mark.parametrize("tp", [1, 2])
def test_names_shapes_and_checkpoint_keys_are_those_of_plain_megatron(tp: int, changes: dict[str, Any]) -> None:
    for ours, plain in run_ranks(contents, tp, tp, changes):
        assert ours == plain


def test_another_model_has_other_contents() -> None:
    ours, _ = run_ranks(contents, 1, 1, {})[0]
    _, plain = run_ranks(contents, 1, 1, {"add_qkv_bias": True})[0]
    assert all(ours[part] != plain[part] for part in ours)


def moved(_: int, changes: dict[str, Any]) -> list[Tensor]:
    """Losses of our model, and of Megatron's after it loaded our weights."""
    layout()
    (ours,) = tiny_chunks(**changes)
    plain = megatrons(**changes)
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        return [losses(model, *batch(1, 2)) for model in (ours, plain)]


@MODELS
def test_our_weights_open_in_plain_megatron_and_give_the_same_losses(changes: dict[str, Any]) -> None:
    ours, plain = run_ranks(moved, 1, changes)[0]
    torch.testing.assert_close(ours, plain, **FP32_SUMS)


def refused(_: int, changes: dict[str, Any]) -> None:
    layout()
    config = tiny_config()
    config.__dict__.update(changes)  # past the checks of Megatron's own that need other settings too
    sparse_layer_spec(config)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"normalization": "L2Norm"}, "--normalization must be one of RMSNorm, LayerNorm for .*, got L2Norm; Llama"),
        ({"layernorm_zero_centered_gamma": True}, "--apply-layernorm-1p must be off for sparse layers"),
        ({"memory_efficient_layer_norm": True}, "memory_efficient_layer_norm needs apex' norm"),
        ({"num_moe_experts": 4}, "dense Llama-like models, got num_moe_experts=4"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True; leave both off"),
        (
            {"attention_backend": AttnBackend.unfused},
            "--attention-backend must be auto or flash .*, got unfused; auto takes flash-attn",
        ),
    ],
)
def test_what_is_neither_llamas_nor_gpt2s_is_refused_by_name(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(RuntimeError, match=f"ValueError: .*{text}"):
        run_ranks(refused, 1, changes)


def insists_on_flash_attention(_: int) -> None:
    layout()
    tiny_chunks(attention_backend=AttnBackend.flash)


def test_insisting_on_flash_attention_that_is_not_installed_is_refused() -> None:
    with pytest.raises(RuntimeError, match="ValueError: flash-attn must be installed"):
        run_ranks(insists_on_flash_attention, 1)


def chosen(_: int) -> list[str]:
    layout()
    norms = [norm_for(tiny_config(normalization=kind)).__name__ for kind in ("RMSNorm", "LayerNorm")]
    return [core_attention_for(tiny_config()).__name__, *norms]


def test_on_a_machine_without_a_gpu_torch_attends_and_normalises() -> None:
    assert run_ranks(chosen, 1)[0] == [SDPACoreAttention.__name__, "RMSNorm", "LayerNorm"]
