"""GPT-2 on the sparse layers against transformers' GPT2LMHeadModel of the same weights: logits and every gradient."""

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import GPT2, GPT2_OUTSIDE, SEQ, VOCAB, bare, batch, layout, positions, tiny_chunks, tiny_config
from tests.helpers.tolerances import FP32_SUMS
from tests.layers.steps import attached

LAYERS, HIDDEN, HEADS, CHANNELS, EPS = 4, 64, 8, 96, 1e-5
SIZE = 2
LAYER = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_1.bias": "input_layernorm.bias",
    "attn.c_attn.weight": "self_attention.linear_qkv.weight",
    "attn.c_attn.bias": "self_attention.linear_qkv.bias",
    "attn.c_proj.weight": "self_attention.linear_proj.weight",
    "attn.c_proj.bias": "self_attention.linear_proj.bias",
    "ln_2.weight": "pre_mlp_layernorm.weight",
    "ln_2.bias": "pre_mlp_layernorm.bias",
    "mlp.c_fc.weight": "mlp.linear_fc1.weight",
    "mlp.c_fc.bias": "mlp.linear_fc1.bias",
    "mlp.c_proj.weight": "mlp.linear_fc2.weight",
    "mlp.c_proj.bias": "mlp.linear_fc2.bias",
}
"""Of one layer, theirs to ours."""
NAMES = {
    "transformer.wte.weight": "embedding.word_embeddings.weight",
    "transformer.wpe.weight": "embedding.position_embeddings.weight",
    "transformer.ln_f.weight": "decoder.final_layernorm.weight",
    "transformer.ln_f.bias": "decoder.final_layernorm.bias",
} | {
    f"transformer.h.{layer}.{theirs}": f"decoder.layers.{layer}.{ours}"
    for layer in range(LAYERS)
    for theirs, ours in LAYER.items()
}


def in_their_form(name: str, ours: Tensor) -> Tensor:
    """A tensor as GPT-2 has it: Q | K | V instead of head by head, and matrices [in, out]."""
    if "linear_qkv" in name:
        ours = ours.view(HEADS, 3, HIDDEN // HEADS, -1).transpose(0, 1).reshape(ours.shape)
    return ours.t().contiguous() if "linear" in name and ours.dim() == 2 else ours


def transformers_gpt2(weights: dict[str, Tensor]) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=SEQ, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=CHANNELS,
        layer_norm_epsilon=EPS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    assert config.activation_function == "gelu_new", "the tanh form"
    model = GPT2LMHeadModel(config)
    state = {theirs: in_their_form(ours, weights[ours]) for theirs, ours in NAMES.items()}
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"], "tied to wte"
    assert not missing.unexpected_keys
    return model


def both(_: int, changes: dict[str, Any]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Logits [b, s, v] and gradients, by our names in their form, of our model and of theirs."""
    layout()
    (chunk,) = tiny_chunks(tiny_config(**GPT2 | changes), **GPT2_OUTSIDE)
    tokens, labels = batch(1, SIZE)
    ours = dict(bare(chunk).named_parameters())
    logits = chunk(tokens, positions(SIZE), None)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    theirs = transformers_gpt2({name: p.detach() for name, p in ours.items()})
    their_logits = theirs(tokens).logits
    F.cross_entropy(their_logits.flatten(0, 1), labels.flatten()).backward()
    their_gradients = {NAMES[name]: p.grad for name, p in theirs.named_parameters() if name in NAMES}
    assert their_gradients.keys() == ours.keys(), "every parameter has its counterpart"
    return [
        (logits.detach(), {name: in_their_form(name, p.grad) for name, p in ours.items()}),
        (their_logits.detach(), their_gradients),
    ]


def test_logits_and_gradients_are_those_of_transformers_gpt2() -> None:
    (logits, gradients), (their_logits, their_gradients) = run_ranks(both, 1, {})[0]
    torch.testing.assert_close(logits, their_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients, their_gradients, **FP32_SUMS)


@pytest.mark.parametrize("changes", [{"activation_func": F.gelu}, {"layernorm_epsilon": 1e-2}], ids=["erf", "epsilon"])
def test_another_form_of_gelu_and_another_epsilon_are_told_apart(changes: dict[str, Any]) -> None:
    (logits, gradients), (their_logits, their_gradients) = run_ranks(both, 1, changes)[0]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits, their_logits, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients, their_gradients, **FP32_SUMS)


def fused(_: int, rate: Fraction) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """A sparse step's logits and gradients with Megatron's kernel of bias and GELU, and with ours."""
    there = layout()
    found = []
    for changes in ({"activation_func": F.gelu, "bias_activation_fusion": True}, {}):
        (chunk,) = tiny_chunks(tiny_config(**GPT2 | changes), **GPT2_OUTSIDE)
        controller = attached([chunk], selection={"selection": "top-k"}, there=there, rate=rate, steps=1)
        with controller.step(1):
            logits = chunk(batch(1, SIZE)[0], positions(SIZE), None)
            logits.square().mean().backward()
        found.append((logits.detach(), {name: p.grad for name, p in bare(chunk).named_parameters()}))
    return found


@pytest.mark.parametrize("rate", [Fraction(0), Fraction(1, 2)])
def test_megatrons_fused_kernel_computes_the_tanh_form_too(rate: Fraction) -> None:
    (logits, gradients), (plain, plain_gradients) = run_ranks(fused, 1, rate)[0]
    torch.testing.assert_close(logits, plain, **FP32_SUMS)
    torch.testing.assert_close(gradients, plain_gradients, **FP32_SUMS)
