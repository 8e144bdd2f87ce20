"""A sparse transformers model against the dense one whose omitted neurons are silent."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_sat.hf.model import SparseModel, sparsify
from tests.helpers.tolerances import EXACT, FP32_SUMS
from tests.hf.models import (
    FAMILIES,
    GROUPS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    blocks,
    chosen,
    constant,
    ladder,
    loss_and_gradients,
    make_batch,
    make_model,
    make_sparse,
    zeroed,
)

Run = tuple[list[float], dict[str, Tensor]]


def test_unless_told_otherwise_neurons_are_chosen_as_in_the_paper() -> None:
    selection = sparsify(make_model(), schedule=constant("1/2")).selection
    way = (selection.importance, selection.selection, selection.temperature, selection.selection_interval)
    assert way == ("maxip", "sampling", 0.05, 1)


def width_of_unit(family: str, gqa: str) -> Any:
    """Activations of one unit: a channel is one, a head d, a query group all its heads'."""
    groups = HEADS if family == "llama-no-groups" else GROUPS
    heads = HEADS // groups if gqa == "group" else 1
    return lambda name: heads * HEAD_DIM if name.startswith("attention") else 1


def sparse_and_twin(
    family: str, *, gqa: str = "group", attention: str = "sdpa", micro_batches: int | None = None, **rest: Any
) -> tuple[Run, Run, dict[str, Tensor]]:
    """Losses and gradients of a sparse step of two micro-batches, those of its twin, and what was kept."""
    model = make_model(family, attention=attention)
    batches = [make_batch(1), make_batch(2)]
    sparse = make_sparse(model, constant(rest.pop("rate", "1/2")), gqa=gqa, **rest)
    with sparse.step(1, micro_batches=micro_batches):
        ours = loss_and_gradients(model, batches)
        kept = chosen(sparse)
    twin = make_model(family, attention=attention)
    with zeroed(twin, kept, width=width_of_unit(family, gqa)):
        theirs = loss_and_gradients(twin, batches)
    return ours, theirs, kept


def assert_same(ours: Run, theirs: Run) -> None:
    assert_close(ours[0], theirs[0], **FP32_SUMS)
    assert_close(ours[1], theirs[1], **FP32_SUMS)


@pytest.mark.parametrize("micro_batches", [None, 2], ids=["gathered", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sparse_model_equals_the_dense_one_with_omitted_neurons_silent(
    family: str, micro_batches: int | None
) -> None:
    ours, theirs, kept = sparse_and_twin(family, micro_batches=micro_batches)
    assert len(kept) == 2 * LAYERS
    assert_same(ours, theirs)


@pytest.mark.parametrize("rate", ["1/4", "3/4", "0.96"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_single_heads_leave_every_group_and_its_key_stays(family: str, attention: str, rate: str) -> None:
    ours, theirs, kept = sparse_and_twin(family, gqa="head", attention=attention, rate=rate)
    per_group = kept["attention.1"] // (HEADS // GROUPS)
    assert torch.bincount(per_group, minlength=GROUPS).unique().numel() == 1
    assert_same(ours, theirs)


def test_eager_attention_with_whole_groups_equals_its_twin() -> None:
    assert_same(*sparse_and_twin("mistral", attention="eager")[:2])


def test_the_twin_sees_one_neuron_too_many() -> None:
    """The negative control of everything above."""
    model = make_model()
    sparse = make_sparse(model)
    with sparse.step(1):
        ours = loss_and_gradients(model, [make_batch(1)])
        kept = chosen(sparse)
    kept["mlp.2"] = kept["mlp.2"][1:]
    twin = make_model()
    with (
        zeroed(twin, kept, width=width_of_unit("llama", "group")),
        pytest.raises(AssertionError, match="not equal|not close"),
    ):
        assert_same(ours, loss_and_gradients(twin, [make_batch(1)]))


@pytest.mark.parametrize("micro_batches", [None, 2], ids=["gathered", "packed"])
def test_omitted_rows_and_columns_get_exactly_zero_gradient(micro_batches: int | None) -> None:
    model = make_model("llama-biases")
    sparse = make_sparse(model)
    with sparse.step(1, micro_batches=micro_batches):
        _, found = loss_and_gradients(model, [make_batch(1), make_batch(2)])
        entries = list(sparse.controller.omitted_entries())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)].split(".")[-2] for parameter, _, _ in entries} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    for parameter, dim, index in entries:
        gradient = found[names[id(parameter)]]
        assert not gradient.index_select(dim, index).any()
        assert gradient.any()


def test_packed_and_gathered_weights_give_the_same_bits() -> None:
    batches = [make_batch(n) for n in range(3)]
    runs = []
    for micro_batches in (3, None):
        model = make_model("llama-biases")
        with make_sparse(model, importance="contribution").step(1, micro_batches=micro_batches):
            runs.append(loss_and_gradients(model, batches))
    assert_close(runs[0], runs[1], **EXACT)


@pytest.mark.parametrize("importance", ["maxip", "contribution"])
@pytest.mark.parametrize("micro_batches", [None, 2], ids=["gathered", "packed"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_no_bit(reentrant: bool, micro_batches: int | None, importance: str) -> None:
    runs, batches = [], [make_batch(1), make_batch(2)]
    for batch in batches:  # filling is left out of the scores
        batch["attention_mask"] = (torch.arange(9) < torch.tensor([[9], [6]])).long()
    for checkpointed in (False, True):
        model = make_model("qwen2", attention_dropout=0.1)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # renamed in v6
            model.enable_input_require_grads()
        with make_sparse(model, importance=importance).step(1, micro_batches=micro_batches):
            torch.manual_seed(3)
            runs.append(loss_and_gradients(model, batches))
    assert_close(runs[0], runs[1], **EXACT)


def test_another_dropout_is_seen() -> None:
    """The negative control: another seed is another loss, so the equality above is not of zeros."""
    losses = []
    for seed in (3, 4):
        model = make_model("qwen2", attention_dropout=0.1)
        with make_sparse(model).step(1):
            torch.manual_seed(seed)
            losses.append(loss_and_gradients(model, [make_batch(1)])[0])
    assert losses[0] != losses[1]


def test_all_micro_batches_of_a_step_share_a_choice_and_steps_differ() -> None:
    model = make_model()
    sparse = make_sparse(model)
    choices = []
    for step in (1, 2):
        with sparse.step(step):
            for seed in range(3):
                model(**make_batch(10 * step + seed))
                choices.append(chosen(sparse))
    assert_close(choices[0], choices[2], **EXACT)
    assert_close(choices[3], choices[5], **EXACT)
    assert any(not torch.equal(choices[0][name], choices[3][name]) for name in choices[0])


@pytest.mark.parametrize("micro_batches", [None, 2], ids=["gathered", "packed"])
def test_rate_0_is_the_dense_model_bit_for_bit(micro_batches: int | None) -> None:
    model, batches = make_model("qwen3"), [make_batch(1), make_batch(2)]
    sparse = make_sparse(model, ladder("1/2", steps=4, start=2, rungs=1))
    with sparse.step(3, micro_batches=micro_batches):
        ours = loss_and_gradients(model, batches)
    assert_close(ours, loss_and_gradients(make_model("qwen3"), batches), **EXACT)


@pytest.mark.parametrize("gqa", ["group", "head"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outside_a_step_and_in_evaluation_the_model_is_dense(attention: str, gqa: str) -> None:
    model, batch = make_model(attention=attention), make_batch(1)
    dense = make_model(attention=attention)
    sparse = make_sparse(model, gqa=gqa)
    assert_close(model(**batch).logits, dense(**batch).logits, **EXACT)
    with sparse.step(1):
        assert not torch.equal(model(**batch).logits, dense(**batch).logits)
        assert_close(model.eval()(**batch).logits, dense.eval()(**batch).logits, **EXACT)
        model.train()
    assert_close(model(**batch).logits, dense.train()(**batch).logits, **EXACT)


def test_names_and_values_of_the_parameters_are_transformers_own(tmp_path: Path) -> None:
    model, dense = make_model("qwen2"), make_model("qwen2")
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    sparse = make_sparse(model)
    with sparse.step(1):
        model(**make_batch()).loss.backward()
    assert list(model.state_dict()) == list(dense.state_dict())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    model.save_pretrained(tmp_path)
    again = type(dense).from_pretrained(tmp_path)
    assert_close(dict(again.state_dict()), dict(dense.state_dict()), **EXACT)
    assert type(again.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_generation_inside_a_step_is_dense() -> None:
    model, dense = make_model().eval(), make_model().eval()
    tokens = make_batch(1, length=4)["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with make_sparse(model).step(1):
        ours = model.generate(tokens, **settings)
    assert torch.equal(ours, dense.generate(tokens, **settings))


def test_remove_leaves_transformers_model() -> None:
    model = make_model()
    sparse = make_sparse(model)
    sparse.open(1)
    model(**make_batch())
    sparse.remove()
    plain = make_model()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    pairs = zip(model.modules(), plain.modules(), strict=True)
    assert not any(set(vars(module)) - set(vars(twin)) for module, twin in pairs)


def test_kept_neurons_are_rescaled_where_asked_and_the_bias_is_not() -> None:
    model = make_model("llama-biases")
    sparse = make_sparse(model, constant("3/4"), rescale="inverse-keep")
    with sparse.step(1):
        logits = model(**make_batch()).logits
        kept = chosen(sparse)
    twin = make_model("llama-biases")
    with torch.no_grad():
        for _, _, row in blocks(twin):
            row.weight.mul_(4)
    with zeroed(twin, kept, width=width_of_unit("llama", "group")):
        assert_close(logits, twin(**make_batch()).logits, **FP32_SUMS)


def test_a_step_that_fails_leaves_the_model_dense_and_uncounted() -> None:
    model = make_model()
    sparse = make_sparse(model)
    with pytest.raises(ValueError, match="one more forward"):
        run_step(sparse, model, told=1, done=2)
    assert not sparse.is_open
    assert [selector.visited_steps for selector in sparse.controller.selectors] == [0] * 4
    assert_close(model(**make_batch()).logits, make_model()(**make_batch()).logits, **EXACT)


def test_too_few_micro_batches_are_an_error() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="micro_batches must be the number of forwards with a backward in a step"):
        run_step(make_sparse(model), model, told=3, done=2)


def test_too_many_micro_batches_are_an_error() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="micro_batches must be the number of forwards in a step, got 1 and one more"):
        run_step(make_sparse(model), model, told=1, done=2)


def test_steps_that_overlap_are_an_error() -> None:
    sparse = make_sparse(make_model())
    sparse.open(1)
    with pytest.raises(ValueError, match="step 2 must begin after the one before it ended, which is open still"):
        sparse.open(2)
    sparse.close()
    with pytest.raises(ValueError, match="a step must be open to be closed, none is; open"):
        sparse.close()


def test_a_step_that_the_schedule_has_not_is_an_error_and_opens_nothing() -> None:
    sparse = make_sparse(make_model(), constant("1/2", steps=4))
    with pytest.raises(ValueError, match="a schedule's step must be between 1 and 4"):
        sparse.open(5)
    assert not sparse.is_open


def run_step(sparse: SparseModel, model: Any, *, told: int, done: int) -> None:
    with sparse.step(1, micro_batches=told):
        loss_and_gradients(model, [make_batch(n) for n in range(done)])


def test_a_copy_of_the_model_outside_a_step_is_independent() -> None:
    model = make_model()
    make_sparse(model)
    assert_close(copy.deepcopy(model)(**make_batch()).logits, model(**make_batch()).logits, **EXACT)
