"""Eq. 2 through the whole program: what a step omits is bit-identical after it, weights and Adam's moments."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_sat.sparsity.neurons import Kept
from tests.helpers.command_line import PAPER
from tests.helpers.engine_state import named, snapshot
from tests.helpers.program import Text, open_session
from tests.helpers.ranks import run_ranks

SPARSE = f"--sat-schedule constant --sat-omission-rate 0.5 {PAPER} --train-iters 4"
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
CASES = {
    "megatron's optimizer": (1, ""),
    "tp 2": (2, "--tensor-model-parallel-size 2"),
    "pp 2, interleaved": (
        2,
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --sat-selection-interval 2",
    ),
    "distributed optimizer": (2, "--use-distributed-optimizer"),
    "bf16, distributed optimizer, overlapped": (2, f"{DISTRIBUTED} --bf16"),
}


class Moved(NamedTuple):
    """Of one tensor in one step."""

    step: int
    what: str
    """weight, main (what Adam steps on), exp_avg or exp_avg_sq."""
    omitted: int
    """Entries of omitted neurons that changed a bit."""
    kept: float
    """Share of the other entries that changed."""
    alive: bool
    """Whether an entry of an omitted neuron was not zero before."""


def watch(_: int, argv: list[str]) -> list[Moved]:
    """Train; after each step, what it did to every tensor of the sparse modules."""
    session = open_session(argv)
    run, found = session.run, []
    names = {id(parameter): name for name, parameter in named(run.engine)}
    before = snapshot(run.engine)
    true = session.stepped

    def stepped(step: int, *args: Any) -> None:
        nonlocal before
        after = snapshot(run.engine)
        for module, selector in run.controller._modules:
            index = selector.state()["kept"].nonzero().squeeze(1)
            omitted = Kept(index=index, units=selector.neurons.units).omitted()
            for parameter, dim, where in module.entries(omitted):
                mask = torch.zeros(parameter.shape, dtype=torch.bool).index_fill_(dim, where, True)
                for key, now in after.items():
                    if key.startswith(f"{names[id(parameter)]} "):
                        found.append(_compare(step, key.split()[-1], mask, before.get(key), now))
        before = after
        true(step, *args)

    session.stepped = stepped  # type: ignore[method-assign, assignment]
    session.train()
    return found


def _compare(step: int, what: str, omitted: Tensor, before: Tensor | None, now: Tensor) -> Moved:
    """before: None of moments that the first step makes; what sat it out must have none."""
    then = torch.zeros_like(now) if before is None else before
    bits = torch.int16 if now.element_size() == 2 else torch.int32
    changed = then.view(bits) != now.view(bits)
    kept = changed[~omitted].float().mean().item()
    return Moved(step, what, int(changed[omitted].sum()), kept, bool((then[omitted] != 0).any()))


@pytest.mark.parametrize("case", CASES)
def test_omitted_neurons_are_bit_identical_after_the_step_and_the_others_move(case: str, text: Text) -> None:
    ranks, flags = CASES[case]
    argv = text.command(f"{SPARSE} --sat-omitted-neurons frozen {flags}")
    moved = [one for rank in run_ranks(watch, ranks, argv) for one in rank]
    assert {one.what for one in moved} == {"weight", "main", "exp_avg", "exp_avg_sq"}
    assert {one.step for one in moved} == {1, 2, 3, 4}
    assert [one for one in moved if one.omitted] == []
    assert any(one.alive for one in moved if one.what == "exp_avg"), "moments must have been held, not absent"
    # half of a sharded tensor lies on the other rank; a bf16 weight moves where its step exceeds its rounding
    least = 0.05 if "bf16" in case else 0.3 if "distributed" in case else 0.9
    seen = {(one.step, one.what) for one in moved}
    kept = [max(one.kept for one in moved if (one.step, one.what) == each) for each in seen]
    assert min(kept) > least


def test_without_freezing_momentum_and_decay_move_omitted_neurons(text: Text) -> None:
    (moved,) = run_ranks(watch, 1, text.command(f"{SPARSE} --sat-omitted-neurons optimizer"))
    for what in ("weight", "exp_avg", "exp_avg_sq"):
        assert all(one.omitted for one in moved if one.what == what and one.step > 1)
