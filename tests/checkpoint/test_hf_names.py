"""The name table: complete, without doubles, and clear about what does not fit it."""

import pytest
import torch

from megatron_sat.checkpoint.hf_names import (
    EXTRA_STATES,
    NAMES,
    Features,
    expected,
    refuse_other_names,
    rows,
)
from tests.checkpoint.families import FAMILIES, model_of
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import bare, layout, tiny_chunks

FEATURES = {
    "llama": Features(num_layers=4, untied=True),
    "llama-biased": Features(num_layers=4, untied=True, qkv_bias=True, linear_bias=True),
    "smollm2": Features(num_layers=4),
    "qwen2": Features(num_layers=4, untied=True, qkv_bias=True),
    "qwen3": Features(num_layers=4, untied=True, qk_norm=True),
}


@pytest.mark.parametrize("family", FEATURES)
def test_the_table_has_exactly_the_parameters_of_transformers_models(family):
    model = model_of(FAMILIES[family]())
    theirs = {name for name, _ in model.named_parameters()}
    names = list(expected(FEATURES[family]))

    assert set(names) == theirs and len(names) == len(theirs)


def _keys(_: int, **changes: object) -> tuple[set[str], set[str]]:
    layout()
    state = bare(tiny_chunks(**changes)[0]).sharded_state_dict(metadata={"singleton_local_shards": False})
    tensors, objects = set(), set()
    for entry in state.values():
        if isinstance(getattr(entry, "data", None), torch.Tensor) or hasattr(entry, "build"):
            tensors.add(entry.key)
        else:
            objects.add(entry.key)
    return tensors, objects


@pytest.mark.parametrize(
    "features, changes",
    [
        (Features(num_layers=4, untied=True), {}),
        (Features(num_layers=4), {"share_embeddings_and_output_weights": True}),
        (Features(num_layers=4, untied=True, qk_norm=True), {"qk_layernorm": True}),
        (Features(num_layers=4, untied=True, qkv_bias=True), {"add_qkv_bias": True}),
        (Features(num_layers=4, untied=True, qkv_bias=True, linear_bias=True), {"add_bias_linear": True}),
    ],
)
def test_the_table_has_exactly_the_keys_of_megatrons_model(features, changes):
    ((tensors, objects),) = run_ranks(_keys, 1, **changes)

    assert {row.megatron for row in rows(features)} == tensors
    assert objects - {"output_layer._extra_state"} == set(EXTRA_STATES)


def test_no_tensor_stands_in_two_rows():
    assert len({row.megatron for row in NAMES}) == len(NAMES)
    assert len({name for row in NAMES for name in row.theirs}) == sum(len(row.theirs) for row in NAMES)


def test_missing_and_unexpected_names_are_all_listed_and_the_nearest_is_named():
    features = Features(num_layers=1, untied=True)
    present = [name for name in expected(features) if "q_proj" not in name and name != "model.norm.weight"]
    present += ["model.layers.0.self_attn.Q_proj.weight", "visual.weight"]

    with pytest.raises(ValueError, match="must be those that its config.json asks for") as caught:
        refuse_other_names(present, features=features)

    said = str(caught.value)
    assert "2 are missing and 2 unexpected" in said
    assert "missing: model.norm.weight" in said and "unexpected: visual.weight" in said
    assert "q_proj.weight (is it model.layers.0.self_attn.Q_proj.weight?)" in said
    assert "nothing was written" in said


def test_buffers_and_the_second_name_of_a_tied_head_are_no_surprise():
    features = Features(num_layers=1)
    present = [*expected(features), "model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"]

    refuse_other_names(present, features=features)


def test_the_head_of_an_untied_model_is_missed():
    features = Features(num_layers=1, untied=True)
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        refuse_other_names(expected(Features(num_layers=1)), features=features)
