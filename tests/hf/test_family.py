"""Which models fit, and what is said of the others."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Linear
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification, LlamaModel

from megatron_sat.hf.family import parts_of
from megatron_sat.sparsity.growing import Growing
from megatron_sat.sparsity.selector import SelectionConfig
from tests.helpers.tolerances import EXACT
from tests.hf.models import FAMILIES, LAYERS, SIZES, make_batch, make_model, make_sparse

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_an_attention_and_an_mlp(family: str) -> None:
    parts = parts_of(make_model(family), config=SelectionConfig())
    assert [(part.kind, part.layer) for part in parts] == [
        (kind, layer) for layer in range(1, LAYERS + 1) for kind in ("attention", "mlp")
    ]
    assert parts[0].name == "model.layers.0.self_attn"


def test_what_is_to_stay_whole_is_no_part() -> None:
    def parts(**selection: Any) -> list[tuple[str, int]]:
        return [(part.kind, part.layer) for part in parts_of(make_model(), config=SelectionConfig(**selection))]

    assert parts(modules="mlp") == [("mlp", layer) for layer in range(1, LAYERS + 1)]
    with pytest.raises(ValueError, match=re.escape(f"--sat-whole-ends ({LAYERS}) at both ends must leave some of the")):
        parts(whole_ends=LAYERS)


@pytest.mark.parametrize("model_class", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_with_another_head_or_none_is_sparse_too(model_class: Any) -> None:
    config = FAMILIES["llama"][0](**SIZES, pad_token_id=0)
    model = model_class(config).train()
    tokens = make_batch()["input_ids"]
    dense = model(tokens)[0]
    sparse = make_sparse(model)
    with sparse.step(1):
        assert not torch.equal(model(tokens)[0], dense)
    assert_close(model(tokens)[0], dense, **EXACT)


def test_a_model_of_another_family_is_an_error() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(ValueError, match="model must be a transformers model of the families llama, .* got gpt2"):
        make_sparse(model)


def test_what_wraps_a_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="got Sequential; pass the model itself, not what wraps it"):
        make_sparse(torch.nn.Sequential(make_model()))


def test_a_replaced_layer_is_an_error_and_the_model_unchanged() -> None:
    model: Any = make_model()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj must be a torch.nn.Linear, got Sequential"):
        make_sparse(model)
    assert type(model.model.layers[0].mlp.up_proj) is Linear


def test_a_model_that_is_sparse_already_is_an_error() -> None:
    model = make_model()
    first = make_sparse(model)
    with pytest.raises(ValueError, match="q_proj must be dense, it is sparse already; call remove"):
        make_sparse(model)
    first.remove()
    make_sparse(model)


def test_a_weight_that_is_cut_over_ranks_is_an_error() -> None:
    model: Any = make_model()
    model.model.layers[0].mlp.gate_proj.weight.device_mesh = object()  # as torch's DTensor has one
    with pytest.raises(ValueError, match="gate_proj.weight must lie on this rank, it is cut over others"):
        make_sparse(model)


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({"selection_groups": 3}, "--sat-selection-groups (3) must divide the query groups (4) of model.layers.0.self"),
        ({"selection_groups": 3, "gqa": "head"}, "--sat-selection-groups (3) must divide the channels (40) of model"),
        ({"omit": "backward"}, "--sat-omit must be both inside transformers models, got backward; pretrain_sat.py"),
        (
            {"selection": "mixed-growing", "growing": Growing(replaced=0.3, random_share=0.25, last_step=9)},
            "--sat-selection must be sampling or top-k inside transformers models, got mixed-growing; pretrain_sat.py",
        ),
        ({"channel_multiple": 41}, "the multiple of kept units must be between 1 and the units of a selection group"),
    ],
)
def test_quotas_that_do_not_fit_are_an_error_and_the_model_unchanged(selection: dict[str, Any], said: str) -> None:
    model: Any = make_model()
    with pytest.raises(ValueError, match=re.escape(said)):
        make_sparse(model, **selection)
    assert type(model.model.layers[0].self_attn.q_proj) is Linear


@pytest.mark.slow
def test_nothing_of_megatron_is_imported() -> None:
    """So it runs where megatron-core is not installed, as trainings with transformers are."""
    found = "[name for name in sys.modules if name.split('.')[0] == 'megatron']"
    code = f"import sys, megatron_sat.hf; print({found})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "[]"
