"""Choices, sums and visits go through a checkpoint whole and come back cut to whatever layout there is."""

from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_sat.training.state import restore_choices, whole_choices, whole_visits
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import batch, layout, losses, tiny_chunks, tiny_config
from tests.layers.steps import WIDE, attached

HALF = Fraction(1, 2)
STEPS = 3
GROUPS, CHANNELS = 8, 96
SELECTION: dict[str, Any] = {"selection_groups": 4, "statistics": "lagged"}


class Held(NamedTuple):
    """Of one rank."""

    states: dict[str, dict[str, Tensor]]
    """Of each selector, its own state: of this rank's shard."""
    whole: dict[str, Tensor]
    visits: dict[str, list[int]]


def after_steps(_: int, tp: int, importance: str, saved: dict[str, Tensor] | None) -> Held:
    """The state after some sparse forwards, or after a restore of ``saved`` instead."""
    there = layout(tp=tp)
    chunks = tiny_chunks(tiny_config(**WIDE))
    selection = SELECTION | {"importance": importance}
    controller = attached(chunks, selection=selection, there=there, rate=HALF, steps=STEPS)
    if saved is not None:
        restore_choices(controller.selectors, saved=saved, layout=there)
    for step in range(1, STEPS + 1) if saved is None else ():
        with controller.step(step):
            losses(chunks[0], *batch(step, 2))
    selectors = controller.selectors
    return Held(
        {f"{s.place.kind}.{s.place.layer}": s.state() for s in selectors},
        whole_choices(selectors, layout=there),
        {name: row.tolist() for name, row in whole_visits(selectors, layout=there).items()},
    )


ALONG = {"maxip": {"kept", "visits"}, "contribution": {"kept", "visits", "contribution_sums"}}
"""What runs along a layer's units, and so is in parts."""


@pytest.mark.parametrize("importance", ALONG)
def test_a_whole_state_is_the_shards_in_a_row(importance: str) -> None:
    one, two = run_ranks(after_steps, 2, 2, importance, None)
    assert one.whole.keys() == two.whole.keys()
    assert len(one.states) == 8
    for module, first in one.states.items():
        for name, mine in first.items():
            whole, theirs = one.whole[f"sat.{module}.{name}"], two.states[module][name]
            want = torch.cat([mine, theirs]) if name in ALONG[importance] else mine
            assert torch.equal(whole, want), (module, name)
            assert torch.equal(two.whole[f"sat.{module}.{name}"], whole)
        units = GROUPS if module.startswith("attention") else CHANNELS
        assert one.whole[f"sat.{module}.kept"].sum() == units // 2
        assert len(one.visits[module]) == units


@pytest.mark.parametrize("importance", ALONG)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2), (4, 2)])
def test_a_restored_state_is_whole_again_at_any_size(importance: str, before: int, after: int) -> None:
    saved = run_ranks(after_steps, before, before, importance, None)[0]
    for rank in run_ranks(after_steps, after, after, importance, saved.whole):
        assert rank.whole.keys() == saved.whole.keys()
        assert all(torch.equal(rank.whole[key], tensor) for key, tensor in saved.whole.items())
        assert rank.visits == saved.visits


def test_a_layer_that_the_checkpoint_has_not_starts_without_a_choice() -> None:
    saved = run_ranks(after_steps, 1, 1, "maxip", None)[0].whole
    known = {key: tensor for key, tensor in saved.items() if not key.startswith("sat.mlp.2.")}
    (rank,) = run_ranks(after_steps, 1, 1, "maxip", known)
    assert rank.states["mlp.2"]["kept"].sum() == 0
    assert rank.states["mlp.3"]["kept"].sum() == CHANNELS // 2


def test_a_layer_of_another_width_is_refused() -> None:
    saved = run_ranks(after_steps, 1, 1, "maxip", None)[0].whole
    wider = saved | {"sat.mlp.3.kept": torch.ones(2 * CHANNELS, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match=r"saved choice of mlp 3 must be of 96 units a shard, .* got 192"):
        run_ranks(after_steps, 1, 1, "maxip", wider)


def by_stage(_: int) -> tuple[set[str], set[str]]:
    """Modules of which a stage gives the state, and those whose visits it knows."""
    there = layout(pp=2)
    chunks = tiny_chunks(tiny_config(**WIDE))
    controller = attached(chunks, selection=SELECTION, there=there, rate=HALF, steps=1)
    states = whole_choices(controller.selectors, layout=there)
    return {".".join(key.split(".")[1:3]) for key in states}, set(whole_visits(controller.selectors, layout=there))


def test_a_stage_gives_its_own_layers_to_a_checkpoint_and_knows_the_visits_of_all() -> None:
    (first, all_visits), (second, same_visits) = run_ranks(by_stage, 2)
    assert first == {"attention.1", "attention.2", "mlp.1", "mlp.2"}
    assert second == {"attention.3", "attention.4", "mlp.3", "mlp.4"}
    assert all_visits == same_visits == first | second
