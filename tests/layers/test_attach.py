"""Selectors for a built model: which modules get one, with what quotas, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat.layers.attach import attach_selectors
from megatron_sat.sparsity.controller import sparse_modules
from megatron_sat.sparsity.selector import SelectionConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout, tiny_chunks, tiny_config


def places(_: int, selection: dict[str, Any], *, tp: int = 1, pp: int = 1) -> list[tuple[Any, ...]]:
    """(kind, layer, shard, shards, groups here, multiple, units here) of every selector of this rank."""
    there = layout(tp=tp, pp=pp)
    chunks = tiny_chunks()
    count = attach_selectors(chunks, config=SelectionConfig(**selection), layout=there)
    selectors = [module.selector for module in sparse_modules(chunks)]
    assert count == len(selectors)
    return [
        (p.kind, p.layer, p.shard, p.num_shards, p.groups, p.multiple, s.neurons.units)
        for s in selectors
        for p in [s.place]
    ]


def test_every_attention_and_mlp_gets_one() -> None:
    attention, mlp = (0, 1, 1, 1, 4), (0, 1, 1, 8, 96)
    assert run_ranks(places, 1, {"channel_multiple": 8})[0] == [
        (kind, layer, *rest) for layer in (1, 2, 3, 4) for kind, rest in (("attention", attention), ("mlp", mlp))
    ]


def test_what_is_to_stay_whole_gets_none() -> None:
    def named(selection: dict[str, Any]) -> list[tuple[str, int]]:
        return [(kind, layer) for kind, layer, *_ in run_ranks(places, 1, selection)[0]]

    assert named({"modules": "mlp"}) == [("mlp", layer) for layer in (1, 2, 3, 4)]
    assert named({"modules": "attention", "whole_ends": 1}) == [("attention", 2), ("attention", 3)]
    found = run_ranks(places, 2, {"whole_ends": 1}, pp=2)
    assert [[(kind, layer) for kind, layer, *_ in rank] for rank in found] == [
        [("attention", 2), ("mlp", 2)],
        [("attention", 3), ("mlp", 3)],
    ]


def test_a_tensor_parallel_rank_has_its_part_of_the_groups_and_units() -> None:
    found = run_ranks(places, 2, {"selection_groups": 4}, tp=2)
    assert [rank[:2] for rank in found] == [
        [("attention", 1, shard, 2, 2, 1, 2), ("mlp", 1, shard, 2, 2, 1, 48)] for shard in (0, 1)
    ]


def test_heads_that_leave_singly_have_a_quota_in_every_query_group() -> None:
    assert run_ranks(places, 1, {"gqa": "head"})[0][0] == ("attention", 1, 0, 1, 4, 1, 8)


def test_a_pipeline_stage_numbers_its_layers_globally() -> None:
    found = run_ranks(places, 2, {}, pp=2)
    assert [[layer for _, layer, *_ in rank] for rank in found] == [[1, 1, 2, 2], [3, 3, 4, 4]]


def refused(_: int, selection: dict[str, Any], model: dict[str, Any], tp: int) -> None:
    there = layout(tp=tp)
    chunks = tiny_chunks()
    for module in chunks[0].modules():
        if hasattr(module, "config"):
            module.config.__dict__.update(model)  # what a CPU could not build is refused all the same
    attach_selectors(chunks, config=SelectionConfig(**selection), layout=there)


@pytest.mark.parametrize(
    "selection, model, tp, text",
    [
        (
            {"selection_groups": 3},
            {},
            2,
            "--sat-selection-groups .3. must be a multiple of the tensor-parallel size .2.; try 2",
        ),
        (
            {"selection_groups": 8},
            {},
            1,
            "--sat-selection-groups .8. must divide the query groups .4.; try 1",
        ),
        (
            {"selection_groups": 64, "gqa": "head"},
            {},
            1,
            "--sat-selection-groups .64. must divide the channels .96.; try 1",
        ),
        ({"channel_multiple": 128}, {}, 1, "selection group .96., got 128; lower --sat-channel-multiple"),
        (
            {},
            {"cuda_graph_impl": "local"},
            1,
            "--cuda-graph-impl must be none for sparse training, got local",
        ),
        ({}, {"mlp_chunks_for_training": 2}, 1, "--mlp-chunks-for-training must be 1 .*, got 2"),
        ({}, {"attention_output_gate": True}, 1, "--attention-output-gate must be off for sparse training"),
        (
            {"selection_groups": 2},
            {"num_query_groups": 1},
            2,
            "--num-query-groups .1. must be at least the tensor-parallel size .2.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    selection: dict[str, Any], model: dict[str, Any], tp: int, text: str
) -> None:
    with pytest.raises(RuntimeError, match=f"ValueError: .*{text}"):
        run_ranks(refused, tp, selection, model, tp)


def sums(rank: int, importance: str, dp_selection: str, sequence_parallel: bool) -> dict[str, list[float]]:
    """What a rank's selector makes of sums that hold the rank's number plus one; 4 ranks: TP 2, DP 2."""
    there = layout(tp=2)
    (chunk,) = tiny_chunks(tiny_config(num_layers=1, sequence_parallel=sequence_parallel))
    config = SelectionConfig(importance=importance, dp_selection=dp_selection, selection_groups=2)
    attach_selectors([chunk], config=config, layout=there)
    selector = sparse_modules([chunk])[0].selector
    assert selector is not None
    mine: Tensor = torch.tensor([float(rank + 1)])
    return selector._add_ranks(mine, selector._metric.needs).tolist()


@pytest.mark.parametrize(
    "importance, dp_selection, sequence_parallel, expected",
    [
        ("uniform", "shared", True, [1, 2, 3, 4]),  # nothing is measured
        ("maxip", "shared", False, [4, 6, 4, 6]),  # ranks 0 and 2 are replicas, and 1 and 3
        ("maxip", "local", False, [1, 2, 3, 4]),
        ("maxip", "shared", True, [10, 10, 10, 10]),  # TP ranks hold parts of the sequence
        ("maxip", "local", True, [3, 3, 7, 7]),
        (
            "contribution",
            "shared",
            True,
            [4, 6, 4, 6],
        ),  # activations are of the whole sequence, of own neurons
    ],
)
def test_sums_are_added_over_the_ranks_that_hold_other_tokens(
    importance: str, dp_selection: str, sequence_parallel: bool, expected: list[float]
) -> None:
    found = run_ranks(sums, 4, importance, dp_selection, sequence_parallel)
    assert [one for (one,) in found] == expected


def context_parallel_sums(rank: int, dp_selection: str) -> list[float]:
    """The same for 4 ranks: CP 2, DP 2."""
    there = layout(cp=2)
    (chunk,) = tiny_chunks(tiny_config(num_layers=1))
    attach_selectors([chunk], config=SelectionConfig(dp_selection=dp_selection), layout=there)
    selector = sparse_modules([chunk])[0].selector
    assert selector is not None
    return selector._add_ranks(torch.tensor([float(rank + 1)]), "inputs").tolist()


@pytest.mark.parametrize("dp_selection, expected", [("shared", [10, 10, 10, 10]), ("local", [3, 3, 7, 7])])
def test_context_parallel_ranks_are_always_added(dp_selection: str, expected: list[float]) -> None:
    assert [one for (one,) in run_ranks(context_parallel_sums, 4, dp_selection)] == expected
