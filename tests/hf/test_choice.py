"""What is kept, against literal scores of what the modules saw."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from megatron_sat.sparsity.schedule import parse_rate
from megatron_sat.sparsity.selection import uniform_draw
from tests.helpers.reference import (
    label_qkv,
    literal_contribution,
    literal_head_scores,
    literal_keep_count,
    literal_scores,
    literal_select,
    mean,
)
from tests.helpers.tolerances import EXACT, FP32_SUMS
from tests.hf.models import (
    CHANNELS,
    GROUPS,
    HEAD_DIM,
    HEADS,
    blocks,
    chosen,
    constant,
    loss_and_gradients,
    make_batch,
    make_model,
    make_sparse,
)

LABELS = [
    row for part in "qkv" for row in label_qkv(groups=GROUPS, heads_per_group=HEADS // GROUPS, head_dim=HEAD_DIM)
    if row.part == part
]


def seen_by(model: Any) -> dict[str, Tensor]:
    """By block the tokens [m, h] of its next forward; filled when the model runs."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(name, tokens.detach().flatten(0, 1))

        return hook

    for name, module, _ in blocks(model):
        module.register_forward_pre_hook(look(name), with_kwargs=True, prepend=True)
    return seen


def scores(metric: str, name: str, module: Any, tokens: Tensor, *, gqa: str, source: str) -> list[float]:
    """Literal scores of the block's units."""
    if name.startswith("mlp"):
        gate = literal_scores(metric, module.gate_proj.weight, tokens)
        up = literal_scores(metric, module.up_proj.weight, tokens)
        return {"gate": gate, "up": up, "gate+up": [mean([g, u]) for g, u in zip(gate, up, strict=True)]}[source]
    weight = torch.cat([module.q_proj.weight, module.k_proj.weight, module.v_proj.weight])
    per_row = literal_scores(metric, weight, tokens)
    return list(literal_head_scores(per_row, LABELS, whole_groups=gqa == "group").values())


CASES = [
    *[(metric, "group", "gate") for metric in ("uniform", "magnitude", "wanda", "maxip")],
    ("maxip", "head", "up"),
    ("wanda", "head", "gate+up"),
]


@pytest.mark.parametrize("rate", ["1/4", "0.6"])
@pytest.mark.parametrize(("metric", "gqa", "source"), CASES)
def test_the_best_by_literal_scores_of_a_blocks_own_tokens_stay(
    metric: str, gqa: str, source: str, rate: str
) -> None:
    model = make_model("qwen3")
    settings = {"importance": metric, "gqa": gqa, "swiglu_score": source, "selection": "top-k"}
    sparse = make_sparse(model, constant(rate), **settings)
    seen = seen_by(model)
    with sparse.step(1):
        model(**make_batch())
        kept = chosen(sparse)
    for name, module, _ in blocks(model):
        found = scores(metric, name, module, seen[name], gqa=gqa, source=source)
        groups = GROUPS if gqa == "head" and name.startswith("attention") else 1
        keep = literal_keep_count(len(found) // groups, parse_rate(rate))
        assert kept[name].tolist() == literal_select(found, groups=groups, keep=keep), name


def test_contribution_is_of_what_a_dense_forward_of_the_block_would_say() -> None:
    model = make_model("qwen2", attention_dropout=0.3)
    sparse = make_sparse(model, importance="contribution", selection="top-k")
    seen = seen_by(model)
    said: dict[str, Tensor] = {}
    dense = make_model("qwen2").eval()
    _, _, row = next(blocks(dense))
    row.register_forward_pre_hook(lambda _, args: said.update({"attention.1": args[0].flatten(0, 1)}))
    dense(**make_batch())
    with sparse.step(1):
        model(**make_batch())
        kept = chosen(sparse)
    for name, module, last in blocks(model):
        if name.startswith("mlp"):
            said[name] = F.silu(module.gate_proj(seen[name])) * module.up_proj(seen[name])
        if name not in said:
            continue
        per_column = literal_contribution(last.weight, said[name])
        width = len(per_column) // (CHANNELS if name.startswith("mlp") else GROUPS)
        found = [mean(per_column[at : at + width]) for at in range(0, len(per_column), width)]
        keep = literal_keep_count(len(found), parse_rate("1/2"))
        assert kept[name].tolist() == literal_select(found, groups=1, keep=keep), name
    assert set(said) == {"attention.1", "mlp.1", "mlp.2"}


def with_filling(*, left: int) -> dict[str, Tensor]:
    """Two texts of 9 and 6 tokens; the second one is filled up, in front or behind, with another token each time."""
    batch = make_batch(5)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, :left] = 0
    mask[1, 6 + left :] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("importance", ["wanda", "maxip", "contribution"])
def test_filling_counts_in_no_score(importance: str) -> None:
    """Whatever stands where the mask is 0, the choice is the same; and without a mask it is not."""

    def choice(filling: int, *, masked: bool) -> dict[str, list[int]]:
        model, batch = make_model(), with_filling(left=0)
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, filling)
        if not masked:
            del batch["attention_mask"]
        sparse = make_sparse(model, importance=importance, selection="top-k")
        with sparse.step(1):
            model(**batch)
            return {name: index.tolist() for name, index in chosen(sparse).items()}

    assert choice(3, masked=True) == choice(40, masked=True)
    assert choice(3, masked=False) != choice(40, masked=False)


def test_a_filled_batch_scores_as_its_texts_alone() -> None:
    """maxip of one filled batch is maxip of its tokens: the count is of text."""
    model, batch = make_model(), with_filling(left=3)
    sparse = make_sparse(model, selection="top-k")
    seen = seen_by(model)
    with sparse.step(1):
        model(**batch)
        kept = chosen(sparse)
    text = seen["mlp.1"][batch["attention_mask"].bool().flatten()]
    gate: Any = model.get_submodule("model.layers.0.mlp.gate_proj").weight
    found = literal_scores("maxip", gate, text)
    assert kept["mlp.1"].tolist() == literal_select(found, groups=1, keep=CHANNELS // 2)


def test_a_mask_of_other_tokens_is_an_error() -> None:
    model = make_model()
    sparse = make_sparse(model)
    batch = make_batch(length=4) | {"attention_mask": torch.ones(2, 9, dtype=torch.long)}
    cache = model(**make_batch(length=5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask must have an entry for each token .* \(2, 4\), got \(2, 9\)"):
        step_with(sparse, model, batch, past_key_values=cache)


def step_with(sparse: Any, model: Any, batch: dict[str, Tensor], **more: Any) -> None:
    with sparse.step(1):
        model(**batch, **more)


def test_a_choice_is_kept_for_its_interval() -> None:
    model = make_model()
    sparse = make_sparse(model, constant("1/2", steps=6), selection_interval=3)
    choices = []
    for step in range(1, 7):
        with sparse.step(step):
            model(**make_batch(step))
            choices.append(chosen(sparse)["mlp.1"].tolist())
    assert choices[0] == choices[1] == choices[2] != choices[3] == choices[4] == choices[5]


def test_lagged_statistics_are_those_of_the_step_before() -> None:
    """Step 2 chooses from step 1's tokens, whatever its own are."""
    choices = []
    for second in (1, 9):
        model = make_model()
        sparse = make_sparse(model, statistics="lagged", selection="top-k")
        for step, seed in ((1, 1), (2, second), (3, 3)):
            with sparse.step(step):
                model(**make_batch(seed))
                choices.append({name: index.tolist() for name, index in chosen(sparse).items()})
    assert choices[1] == choices[4]
    assert choices[2] != choices[5]


def test_selection_groups_and_multiples_set_the_quotas() -> None:
    model = make_model()
    sparse = make_sparse(model, constant("1/2"), selection_groups=2, channel_multiple=3)
    assert sparse.omission_rates(1) == {"attention": 0.5, "mlp": 1 - 18 / CHANNELS}
    with sparse.step(1):
        model(**make_batch())
        assert (chosen(sparse)["mlp.1"] < CHANNELS // 2).sum() == 9


def test_the_noise_is_the_programs_own() -> None:
    """A function of seed, step, layer, kind and neuron: the Megatron program draws the same."""
    model = make_model()
    sparse = make_sparse(model, importance="uniform", seed=77)
    for step in (1, 2):
        with sparse.step(step):
            model(**make_batch(step))
            kept = chosen(sparse)
        for name, index in kept.items():
            kind, layer = name.split(".")
            units = GROUPS if kind == "attention" else CHANNELS
            drawn = uniform_draw(units, seed=77, step=step, layer=int(layer), kind=kind)
            keys = [-math.log(-math.log(value)) for value in drawn.tolist()]
            assert index.tolist() == literal_select(keys, groups=1, keep=units // 2)


def test_another_seed_is_another_choice() -> None:
    found = []
    for seed in (1, 1, 2):
        model = make_model()
        sparse = make_sparse(model, importance="uniform", seed=seed)
        with sparse.step(1):
            losses, _ = loss_and_gradients(model, [make_batch()])
        found.append(losses)
    assert_close(found[0], found[1], **EXACT)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(found[0], found[2], **FP32_SUMS)
