"""The engine on DeepSpeed: whatever the stage and the layout, it trains as the engine on megatron.core does."""

import math
import sys
from typing import Any

import pytest
import torch

from megatron_sat.engines import deepspeed
from megatron_sat.engines.base import Batch, forward_tokens
from megatron_sat.engines.deepspeed import library
from tests.engines.test_megatron import LOSS, NORM, STEPS, far
from tests.engines.test_megatron import run as run_on_megatron
from tests.helpers.plain_engine import MICRO_BATCHES, batches_of, train
from tests.helpers.ranks import run_ranks
from tests.helpers.slow import mostly_slow
from tests.helpers.zero_engine import load_library, make_zero_engine, needs_deepspeed

pytestmark = needs_deepspeed

SP = {"sequence_parallel": True}

LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "zero 0": (0, 1, {}),
    "zero 1": (1, 1, {}),
    "zero 2": (2, 1, {}),
    "zero 3": (3, 1, {}),
    "zero 0, dp 2": (0, 2, {}),
    "zero 1, dp 2": (1, 2, {}),
    "zero 2, dp 2": (2, 2, {}),
    "zero 3, dp 2": (3, 2, {}),
    "zero 0, tp 2": (0, 2, {"tp": 2}),
    "zero 1, tp 2, sequence parallel": (1, 2, {"tp": 2, "model": SP}),
    "zero 1, tp 2, dp 2": (1, 4, {"tp": 2}),
    "zero 2, tp 2, dp 2": (2, 4, {"tp": 2}),
    "zero 3, tp 2, dp 2, sequence parallel": (3, 4, {"tp": 2, "model": SP}),
}

FAST = ("zero 0, dp 2", "zero 2, dp 2", "zero 3, dp 2", "zero 1, tp 2, sequence parallel")


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    load_library()


def run(rank: int, stage: int, settings: dict[str, Any]) -> dict[str, Any]:
    engine, layout = make_zero_engine(stage, **settings)
    steps = train(engine, layout, steps=STEPS)  # type: ignore[arg-type]
    evaluation = engine.evaluate(batches_of(99, layout), num_micro_batches=MICRO_BATCHES // layout.dp_size)
    after = train(engine, layout, steps=range(4, 5))  # type: ignore[arg-type]
    return {"steps": steps + after, "evaluation": (evaluation.loss, evaluation.num_tokens)}


def test_without_the_package_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="--engine deepspeed needs the package deepspeed, which cannot be imported"):
        library()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_ranks(run_on_megatron, 1, {})[0]


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, fast=FAST))
def test_a_stage_in_a_layout_trains_and_evaluates_like_megatrons_engine_alone(
    layout: str, alone: dict[str, Any]
) -> None:
    stage, ranks, settings = LAYOUTS[layout]
    answers = run_ranks(run, ranks, stage, settings)
    assert all(answer == answers[0] for answer in answers), "ranks must report the same"
    loss, norm = far(answers[0], other=alone)
    assert loss < LOSS
    assert norm < NORM


def run_without_sums(rank: int, stage: int, settings: dict[str, Any]) -> dict[str, Any]:
    deepspeed._sum_over_tp = lambda *_, **__: None  # type: ignore[assignment]
    return run(rank, stage, settings)


def test_norms_whose_gradients_are_not_summed_over_tensor_parallelism_are_told_apart(alone: dict[str, Any]) -> None:
    answer = run_ranks(run_without_sums, 2, 1, {"tp": 2, "model": SP})[0]
    assert far(answer, other=alone)[0] > 10 * LOSS


def not_finite(rank: int) -> None:
    engine, layout = make_zero_engine(2)

    def spoilt(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return forward_tokens(model, batch) * math.nan

    engine.train_step(batches_of(0, layout), num_micro_batches=MICRO_BATCHES, forward=spoilt)


def test_a_gradient_that_is_no_number_ends_a_run_that_nothing_else_watches() -> None:
    with pytest.raises(RuntimeError, match="the gradient must be finite, its norm is nan at loss nan; lower --lr"):
        run_ranks(not_finite, 1)
