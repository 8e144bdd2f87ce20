"""LoRA and (IA)3 on a tiny Llama against the same model with the change written into its weights, by loops."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sat.baselines import peft as baselines
from tests.helpers.tolerances import EXACT, FP32_SUMS

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed: pip install 'megatron-sat[hf]'"
)
TOKENS = torch.arange(18).view(2, 9) % 13
LAYERS = 2


def make_model() -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=20, **sizes)).train()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def disturb(model: Any) -> dict[str, Tensor]:
    """Give every parameter that can be trained a value that matters; a copy of each by name."""
    torch.manual_seed(1)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.rand_like(parameter) - 0.3
            found[name] = parameter.data.clone()
    return found


def linear_layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in model.named_modules() if name.rpartition(".")[2] in baselines.LINEAR]


def with_lora_written_in(learned: dict[str, Tensor], *, rank: int) -> Any:
    """W + (16 / r) B A, entry by entry."""
    model = make_model()
    for name, layer in linear_layers(model):
        a = learned[f"base_model.model.{name}.lora_A.default.weight"]
        b = learned[f"base_model.model.{name}.lora_B.default.weight"]
        assert a.shape == (rank, layer.in_features) and b.shape == (layer.out_features, rank)
        for out in range(layer.out_features):
            change = sum(b[out, k] * a[k] for k in range(rank))
            layer.weight.data[out] += 16 / rank * change
    return model


def with_ia3_written_in(learned: dict[str, Tensor]) -> Any:
    """Row i of W times l_i; of the MLP's last layer column j times l_j."""
    model = make_model()
    for name, layer in linear_layers(model):
        scale = learned[f"base_model.model.{name}.ia3_l.default"].flatten()
        if name.endswith("down_proj"):
            for column in range(layer.in_features):
                layer.weight.data[:, column] *= scale[column]
        else:
            for row in range(layer.out_features):
                layer.weight.data[row] *= scale[row]
    return model


@needs_peft
@pytest.mark.parametrize("rank", [1, 8])
def test_lora_is_w_plus_ba_times_alpha_over_r_in_all_seven_layers(rank: int) -> None:
    model = baselines.with_lora(make_model(), rank=rank, dropout=0.0)
    learned = disturb(model)
    assert len(learned) == 2 * 7 * LAYERS
    assert_close(model(TOKENS).logits, with_lora_written_in(learned, rank=rank)(TOKENS).logits, **FP32_SUMS)


@needs_peft
def test_ia3_scales_outputs_and_what_the_mlps_last_layer_is_given() -> None:
    model = baselines.with_ia3(make_model())
    learned = disturb(model)
    assert len(learned) == 7 * LAYERS
    assert_close(model(TOKENS).logits, with_ia3_written_in(learned)(TOKENS).logits, **FP32_SUMS)


METHODS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda model: baselines.with_lora(model, rank=4),
    "ia3": baselines.with_ia3,
}


@needs_peft
def test_loras_gradients_are_those_of_the_weight_by_the_chain_rule() -> None:
    """W' = W + (16 / r) B A: dA = (16 / r) Bᵀ dW', dB = (16 / r) dW' Aᵀ."""
    model = baselines.with_lora(make_model(), rank=4, dropout=0.0)
    learned = disturb(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    written = with_lora_written_in(learned, rank=4)
    written(TOKENS, labels=TOKENS).loss.backward()
    for name, layer in linear_layers(written):
        of_a, of_b = (f"base_model.model.{name}.lora_{side}.default.weight" for side in "AB")
        assert_close(model.get_parameter(of_a).grad, 4 * learned[of_b].T @ layer.weight.grad, **FP32_SUMS)
        assert_close(model.get_parameter(of_b).grad, 4 * layer.weight.grad @ learned[of_a].T, **FP32_SUMS)
        assert layer.weight.grad.abs().max() > 100 * FP32_SUMS["atol"]


@needs_peft
def test_ia3s_gradients_are_those_of_the_weight_by_the_chain_rule() -> None:
    """W'_ij = l_i W_ij: dl_i is the sum over j of dW'_ij W_ij; the other way round in the MLP's last layer."""
    model = baselines.with_ia3(make_model())
    learned = disturb(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    written = with_ia3_written_in(learned)
    written(TOKENS, labels=TOKENS).loss.backward()
    before = dict(make_model().named_parameters())
    for name, layer in linear_layers(written):
        products = layer.weight.grad * before[f"{name}.weight"].detach()
        found = model.get_parameter(f"base_model.model.{name}.ia3_l.default").grad
        assert_close(found.flatten(), products.sum(0 if name.endswith("down_proj") else 1), **FP32_SUMS)
        assert found.abs().max() > 100 * FP32_SUMS["atol"]


@needs_peft
@pytest.mark.parametrize("method", METHODS)
def test_at_the_start_nothing_is_changed_and_little_can_be_trained(method: str) -> None:
    model = METHODS[method](make_model()).eval()
    assert_close(model(TOKENS).logits, make_model().eval()(TOKENS).logits, **EXACT)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "ia3_l" in name for name in trained)


@needs_peft
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_a_plain_model_that_computes_the_same(method: str) -> None:
    model = METHODS[method](make_model()).eval()
    disturb(model)
    before = model(TOKENS).logits
    plain: Any = baselines.merged(model)
    assert list(plain.state_dict()) == list(make_model().state_dict())
    assert_close(plain(TOKENS).logits, before, **FP32_SUMS)


@needs_peft
def test_lora_has_the_papers_settings() -> None:
    model = baselines.with_lora(make_model(), rank=64)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (64, 16, 0.1, "none")
    assert config.target_modules == set(baselines.LINEAR)
    assert baselines.LORA_RANKS == (8, 16, 32, 64)


@needs_peft
def test_a_dropout_of_loras_input_is_there() -> None:
    model = baselines.with_lora(make_model(), rank=4)
    disturb(model)
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)


def test_a_rank_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="the rank of LoRA must be at least 1, got 0; the paper tries 8 to 64"):
        baselines.with_lora(make_model(), rank=0)


@needs_peft
def test_a_model_without_the_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="must have the linear layers q_proj, .* it has no q_proj, k_proj"):
        baselines.with_ia3(torch.nn.Linear(2, 2))


def test_without_the_package_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"need the package peft, .*No module named 'peft'.*; pip"):
        baselines.with_lora(make_model(), rank=8)
