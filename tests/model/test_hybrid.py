"""HybridModel on the sparse layers against the GPTModel of the same weights: ``*-*-`` is two Llama layers."""

import importlib
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import GPT2, SEQ, VOCAB, batch, layout, losses, tiny_chunks, tiny_config, whole_choices
from tests.layers.steps import WIDE, attached

hybrid_model = pytest.importorskip(
    "megatron.core.models.hybrid.hybrid_model", reason="megatron-core 0.16 has no HybridModel"
)
sparse_hybrid = importlib.import_module("megatron_sat.model.hybrid")

GPT2_LAYERS = {name: value for name, value in GPT2.items() if name != "num_query_groups"}
GPT_TO_HYBRID = {
    "decoder.layers.0.input_layernorm": "decoder.layers.0.input_layernorm",
    "decoder.layers.0.self_attention": "decoder.layers.0.self_attention",
    "decoder.layers.0.pre_mlp_layernorm": "decoder.layers.1.pre_mlp_layernorm",
    "decoder.layers.0.mlp": "decoder.layers.1.mlp",
    "decoder.layers.1.input_layernorm": "decoder.layers.2.input_layernorm",
    "decoder.layers.1.self_attention": "decoder.layers.2.self_attention",
    "decoder.layers.1.pre_mlp_layernorm": "decoder.layers.3.pre_mlp_layernorm",
    "decoder.layers.1.mlp": "decoder.layers.3.mlp",
    "decoder.final_layernorm": "decoder.final_norm",
}


def hybrid_name(name: str) -> str:
    """A parameter's name in HybridModel from that in GPTModel."""
    for gpt, hybrid in GPT_TO_HYBRID.items():
        if name.startswith(gpt + "."):
            return hybrid + name.removeprefix(gpt)
    return name


def models(**changes: Any) -> tuple[nn.Module, nn.Module]:
    """A GPTModel of two layers and the HybridModel of the same weights."""
    (gpt,) = tiny_chunks(tiny_config(num_layers=2, **WIDE, **changes))
    config = tiny_config(num_layers=4, **WIDE, **changes)
    hybrid = hybrid_model.HybridModel(
        config,
        sparse_hybrid.sparse_hybrid_stack_spec(config),
        VOCAB,
        SEQ,
        hybrid_layer_pattern="*-*-",
        position_embedding_type="rope",
    )
    hybrid.load_state_dict({hybrid_name(name): tensor for name, tensor in gpt.state_dict().items()})
    return gpt, hybrid


def step(model: nn.Module, there: Any, rate: Fraction) -> tuple[Tensor, dict[str, Tensor], list[list[int]]]:
    """Losses, gradients and choices (in the model's order) of a sparse step that keeps the best."""
    selection = {"selection": "top-k", "selection_groups": there.tp_size}
    controller = attached([model], selection=selection, there=there, rate=rate, steps=1)
    with controller.step(1):
        found = losses(model, *batch(1, 2))
        found.mean().backward()
        choices = list(whole_choices(controller.selectors).values())
    return found.detach(), {name: p.grad for name, p in model.named_parameters()}, choices


def both_steps(_: int, rate: Fraction, tp: int, changes: dict[str, Any]) -> list[Any]:
    there = layout(tp=tp)
    gpt, hybrid = (step(model, there, rate) for model in models(**changes))
    return [(gpt[0], {hybrid_name(name): grad for name, grad in gpt[1].items()}, gpt[2]), hybrid]


@pytest.mark.parametrize("rate", [Fraction(0), Fraction(1, 2)], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "tp, changes",
    [(1, {}), (1, {"qk_layernorm": True, "add_qkv_bias": True}), (2, {"sequence_parallel": True}), (1, GPT2_LAYERS)],
    ids=["llama", "qwen", "tp2-sp", "gpt2"],
)
def test_a_hybrid_model_keeps_and_computes_what_the_gpt_model_does(
    rate: Fraction, tp: int, changes: dict[str, Any]
) -> None:
    for (gpt_loss, gpt_grads, gpt_choices), (loss, grads, choices) in run_ranks(both_steps, tp, rate, tp, changes):
        assert choices == gpt_choices
        assert torch.equal(loss, gpt_loss)
        assert grads.keys() == gpt_grads.keys()
        assert all(torch.equal(grads[name], grad) for name, grad in gpt_grads.items())


def test_the_sparse_hybrid_model_differs_from_the_dense_one() -> None:
    dense, sparse = (run_ranks(both_steps, 1, rate, 1, {})[0][1] for rate in (Fraction(0), Fraction(1, 2)))
    assert not torch.equal(dense[0], sparse[0])


def train(_: int) -> list[float]:
    """The dense losses of one batch before and after ten sparse steps on it."""
    there = layout()
    _, model = models()
    controller = attached([model], selection={}, there=there, rate=Fraction(1, 2), steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with torch.no_grad():
        before = float(losses(model, *batch(1, 2)).mean())
    for number in range(1, 11):
        optimizer.zero_grad()
        with controller.step(number):
            losses(model, *batch(1, 2)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return [before, float(losses(model, *batch(1, 2)).mean())]


def test_sparse_steps_train_the_dense_model() -> None:
    before, after = run_ranks(train, 1)[0]
    assert after < before - 0.5


def keys(_: int) -> tuple[list[str], list[str]]:
    """The keys of a distributed checkpoint of the hybrid model, and its parameters."""
    layout()
    _, model = models()
    tensors = [key for key in model.sharded_state_dict() if not key.endswith("_extra_state")]
    return tensors, [name for name, _ in model.named_parameters()]


def test_a_distributed_checkpoint_holds_every_parameter_under_its_name() -> None:
    held, parameters = run_ranks(keys, 1)[0]
    assert sorted(held) == sorted(parameters)
