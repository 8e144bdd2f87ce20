"""Wall 2 through the whole program: a module chooses once a step, and all its forwards reuse the choice."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat.sparsity.neurons import Kept
from megatron_sat.sparsity.selector import Selector
from tests.helpers.command_line import PAPER
from tests.helpers.program import Text, open_session
from tests.helpers.ranks import run_ranks

STEPS, MICRO_BATCHES = 3, 4
SPARSE = f"--sat-schedule constant --sat-omission-rate 0.5 {PAPER} --train-iters {STEPS}"
Seen = dict[int, dict[str, list[list[int]]]]
"""By step and "kind.layer", what each forward of a training step computed with."""


def watch(_: int, argv: list[str]) -> Seen:
    """Train, and write down what each training forward kept."""
    session = open_session(argv)
    seen: Seen = {step: {} for step in range(STEPS + 1)}
    true = Selector.kept

    def kept(self: Selector, *args: Any) -> Kept | None:
        choice = true(self, *args)
        index = list(range(self.neurons.units)) if choice is None else choice.index.tolist()
        step = 0 if self._wanted is None else self.visited_steps + 1
        seen[step].setdefault(f"{self.place.kind}.{self.place.layer}", []).append(index)
        return choice

    Selector.kept = kept  # type: ignore[method-assign, assignment]
    session.train()
    return seen


CASES: dict[str, tuple[int, str, int]] = {
    "accumulated": (1, "", 1),
    "recomputed": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 2),
    "two stages": (2, "--pipeline-model-parallel-size 2", 1),
    "interleaved": (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --sat-statistics lagged",
        1,
    ),
    "two replicas": (2, "--global-batch-size 16", 1),
}
"""Ranks, flags, and how often a micro-batch goes forward."""


@pytest.mark.parametrize("case", CASES)
def test_every_forward_of_a_step_uses_one_choice_and_the_next_step_another(case: str, text: Text) -> None:
    ranks, flags, forwards = CASES[case]
    answers = run_ranks(watch, ranks, text.command(f"{SPARSE} {flags}"))
    by_module: dict[str, list[list[list[int]]]] = {}
    for seen in answers:
        for step in range(1, STEPS + 1):
            for name, indices in seen[step].items():
                assert len(indices) == MICRO_BATCHES * forwards
                assert all(index == indices[0] for index in indices), (case, step, name)
                by_module.setdefault(name, []).append(indices[0])
    assert len(by_module) == 8  # attention and MLP of 4 layers
    for name, choices in by_module.items():
        replicas = len(choices) // STEPS
        assert all(choices[n] == choices[n % STEPS] for n in range(replicas * STEPS)), "replicas choose alike"
        if name.startswith("mlp"):  # of 4 query groups two leave: they may be the same ones again
            assert choices[0] != choices[1] != choices[2]


def test_replicas_that_choose_for_themselves_keep_different_neurons(text: Text) -> None:
    local = f"{SPARSE} --sat-dp-selection local --global-batch-size 16 --sat-selection top-k"
    one, two = run_ranks(watch, 2, text.command(local))
    assert one[1]["mlp.1"][0] != two[1]["mlp.1"][0]
    assert len(one[1]["mlp.1"][0]) == len(two[1]["mlp.1"][0]) == 48


def test_an_evaluation_between_sparse_steps_is_dense(text: Text) -> None:
    (seen,) = run_ranks(watch, 1, text.command(f"{SPARSE} --eval-interval 1"))
    assert {len(index) for index in seen[0]["mlp.1"]} == {96}
    assert {len(index) for index in seen[1]["mlp.1"]} == {48}


def evaluate_plainly(_: int, argv: list[str]) -> tuple[list[float], list[float]]:
    """The program's evaluation after a sparse step, and the same model without its selectors."""
    session = open_session(argv)
    session.train()
    engine = session.run.engine
    sparse = [engine.evaluate(iter(b), num_micro_batches=len(b)).loss for b in session.valid.values()]
    for module in session.run.engine.chunks[0].modules():
        if hasattr(module, "selector"):
            module.selector = None  # type: ignore[assignment]
    plain = [engine.evaluate(iter(b), num_micro_batches=len(b)).loss for b in session.valid.values()]
    return sparse, plain


def test_the_loss_of_an_evaluation_is_that_of_the_model_without_selectors(text: Text) -> None:
    """Wall 6."""
    ((sparse, plain),) = run_ranks(evaluate_plainly, 1, text.command(SPARSE))
    assert len(plain) == 2
    assert sparse == plain


def choices_of_an_interval(_: int, argv: list[str]) -> list[Tensor]:
    session = open_session(argv)
    selector = session.run.controller.selectors[1]
    rows: list[Tensor] = []
    true = session.stepped

    def stepped(*args: Any) -> None:
        rows.append(selector.state()["kept"])
        true(*args)

    session.stepped = stepped  # type: ignore[method-assign, assignment]
    session.train()
    return rows


def test_a_choice_lasts_for_its_interval_and_not_longer(text: Text) -> None:
    argv = text.command(f"{SPARSE} --train-iters 7 --sat-selection-interval 3")
    (rows,) = run_ranks(choices_of_an_interval, 1, argv)
    same = [bool(torch.equal(a, b)) for a, b in pairwise(rows)]
    assert same == [True, True, False, True, True, False]
