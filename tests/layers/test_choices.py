"""When a model chooses and when it keeps its choice: micro-batches, steps, replicas, recomputation."""

from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from megatron_sat.layers.sparse import SparsePair
from megatron_sat.sparsity.importance import METRICS
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import batch, layout, losses, tiny_chunks, tiny_config, whole_choices
from tests.layers.steps import WIDE, Outcome, Setup, attached, outcome

Choices = dict[str, list[int]]


def micro_batch_choices(_: int, order: list[int], selection: dict[str, Any]) -> list[Choices]:
    """The choices after each micro-batch of one step; micro-batches by number."""
    there = layout()
    (chunk,) = tiny_chunks(tiny_config(**WIDE))
    controller = attached([chunk], selection=selection, there=there, rate=Fraction(1, 2), steps=1)
    found = []
    with controller.step(1):
        for number in order:
            losses(chunk, *batch(number, 2)).mean().backward()
            found.append(whole_choices(controller.selectors))
    return found


TOP_K = {"selection": "top-k"}


def test_the_micro_batches_of_a_step_share_the_choice() -> None:
    first, *others = run_ranks(micro_batch_choices, 1, [0, 1, 2], TOP_K)[0]
    assert all(other == first for other in others)


def test_the_first_micro_batch_makes_the_choice() -> None:
    chosen_by = [run_ranks(micro_batch_choices, 1, order, TOP_K)[0][-1] for order in ([0, 1], [1, 0], [0, 2])]
    assert chosen_by[0] == chosen_by[2] != chosen_by[1]


def test_layers_and_modules_choose_differently() -> None:
    choices = outcome(Setup(selection={"importance": "uniform"})).choices[0]
    by_kind = [[tuple(units) for name, units in choices.items() if kind in name] for kind in ("att", "mlp")]
    assert [len(set(units)) for units in by_kind] == [4, 4]


@pytest.mark.parametrize("interval, distinct", [(1, [True, True, True]), (2, [False, True, False])])
def test_steps_choose_differently_once_an_interval(interval: int, distinct: list[bool]) -> None:
    selection = {"importance": "uniform", "selection_interval": interval}
    choices = outcome(Setup(selection=selection, steps=4, micro_batches=1)).choices
    assert [before != after for before, after in pairwise(choices)] == distinct


def test_a_step_at_rate_zero_keeps_all() -> None:
    choices = outcome(Setup(rate=Fraction(0))).choices[0]
    assert all(units == list(range(96 if "mlp" in name else 8)) for name, units in choices.items())


def replica_choices(_: int, dp_selection: str, same_data: bool) -> Choices:
    """The choice of each of two replicas."""
    there = layout()
    (chunk,) = tiny_chunks(tiny_config(**WIDE))
    selection = {"dp_selection": dp_selection, **TOP_K}
    controller = attached([chunk], selection=selection, there=there, rate=Fraction(1, 2), steps=1)
    with controller.step(1):
        losses(chunk, *batch(0 if same_data else there.dp_rank, 2)).mean().backward()
        return whole_choices(controller.selectors)


@pytest.mark.parametrize(
    "dp_selection, same_data, alike",
    [("shared", False, True), ("local", True, True), ("local", False, False)],
)
def test_replicas_of_other_data_keep_the_same_neurons_if_shared_and_others_if_local(
    dp_selection: str, same_data: bool, alike: bool
) -> None:
    first, second = run_ranks(replica_choices, 2, dp_selection, same_data)
    assert (first == second) == alike


RECOMPUTE = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full-two-layers": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 2,
    },
    "core-attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}


def with_dropout(importance: str, **model: Any) -> Setup:
    statistics = "lagged" if importance == "wanda" else "fresh"
    return Setup(model=DROPOUT | model, selection={"importance": importance, "statistics": statistics}, steps=2)


def assert_identical(found: Outcome, expected: Outcome) -> None:
    assert found.choices == expected.choices
    assert found.losses == expected.losses
    assert all(torch.equal(found.grads[name], grad) for name, grad in expected.grads.items())


@cache
def whole(importance: str) -> Outcome:
    """Nothing recomputed."""
    return outcome(with_dropout(importance))


@pytest.mark.parametrize(
    "importance, how",
    [(importance, "full") for importance in METRICS]
    + [(importance, how) for how in RECOMPUTE if how != "full" for importance in ("maxip", "contribution")],
)
def test_recomputation_repeats_the_step_bit_for_bit(importance: str, how: str) -> None:
    assert_identical(outcome(with_dropout(importance, **RECOMPUTE[how])), whole(importance))


def test_another_dropout_is_told_apart() -> None:
    with pytest.raises(AssertionError):
        assert_identical(outcome(replace(with_dropout("maxip"), seed=6)), whole("maxip"))


def let_looks_draw() -> None:
    SparsePair._without_dropout = lambda self: nullcontext()


def test_recomputation_would_not_repeat_the_step_if_a_look_drew_random_numbers() -> None:
    recomputed = with_dropout("contribution", **RECOMPUTE["full"])
    with pytest.raises(AssertionError):
        assert_identical(outcome(recomputed, let_looks_draw), whole("contribution"))


@pytest.mark.parametrize("how", ["full", "core-attention"])
def test_recomputation_repeats_the_step_under_tensor_and_sequence_parallelism(how: str) -> None:
    model = {"sequence_parallel": True}
    plain, recomputed = (
        replace(
            with_dropout("contribution", **model, **extra),
            tp=2,
            selection={"importance": "contribution", "selection_groups": 2},
        )
        for extra in ({}, RECOMPUTE[how])
    )
    assert_identical(outcome(recomputed), outcome(plain))


@pytest.mark.parametrize("importance", METRICS)
def test_every_metric_leaves_the_rate_and_gradients_to_what_is_kept(importance: str) -> None:
    found = outcome(Setup(selection={"importance": importance}))
    grad = found.grads["decoder.layers.2.mlp.linear_fc2.weight"]
    kept = found.choices[0]["mlp.3"]
    assert len(kept) == 48 and sorted(grad.any(0).nonzero().flatten().tolist()) == kept
