"""What a selector leaves in a checkpoint: read back, cut for another TP size, dropped where it is useless."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sat.sparsity.importance import METRICS
from tests.helpers.choosing import SmallModule, choose, in_step, tokens_of

KINDS: list[tuple[str, str]] = [("mlp", "group"), ("attention", "group"), ("attention", "head")]
"""(kind, gqa)"""
LAGGED = {"statistics": "lagged"}


def after_two_steps(*args: Any, **settings: Any) -> SmallModule:
    """A module in the middle of an interval of 3 steps."""
    module = SmallModule(*args, **settings)
    for step in (1, 2):
        choose(module, step, number=step, interval=3)
    return module


def joined(parts: list[SmallModule]) -> dict[str, Tensor]:
    """The whole layer's state, as a checkpoint holds it."""
    states = [part.chooser.state() for part in parts]
    along = parts[0].chooser.sharded_state
    return {
        name: torch.cat([s[name] for s in states]) if name in along else states[0][name] for name in states[0]
    }


def cut_for(module: SmallModule, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's part of a whole layer's state."""
    place, along = module.chooser.place, module.chooser.sharded_state
    return {
        name: tensor.chunk(place.num_shards)[place.shard] if name in along else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("statistics", ["fresh", "lagged"])
@pytest.mark.parametrize("importance", METRICS)
@pytest.mark.parametrize(("kind", "gqa"), KINDS)
def test_a_reloaded_selector_goes_on_as_the_one_that_never_stopped(kind, gqa, importance, statistics):
    settings = {"gqa": gqa, "importance": importance, "statistics": statistics}
    goes_on, resumed = after_two_steps(kind, **settings), SmallModule(kind, **settings)
    choose(goes_on, 3, number=3, interval=3)
    resumed.chooser.load_state(goes_on.chooser.state())

    for step in (4, 5, 6, 7):
        expected = choose(goes_on, step, number=step, interval=3)
        assert choose(resumed, step, number=step, interval=3) == expected
    assert torch.equal(resumed.chooser.visits, goes_on.chooser.visits)
    assert resumed.chooser.visited_steps == goes_on.chooser.visited_steps == 7


@pytest.mark.parametrize("statistics", ["fresh", "lagged"])
def test_a_choice_held_in_mid_interval_is_held_after_a_reload_without_looking_again(statistics):
    saved, resumed = after_two_steps(statistics=statistics), SmallModule(statistics=statistics)
    resumed.chooser.load_state(saved.chooser.state())
    with in_step(resumed, 3, next_rate=Fraction(0), interval=3):
        chosen = resumed.forward(tokens_of(99))

    assert chosen == choose(SmallModule(), 1, number=1)
    assert chosen != choose(SmallModule(), 1, number=99)
    assert resumed.asked == []


def test_without_the_state_the_same_step_would_choose_again():
    forgetful = SmallModule()

    assert choose(forgetful, 3, number=99, interval=3) != choose(SmallModule(), 1, number=1)


@pytest.mark.parametrize("importance", ["maxip", "contribution"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize(("kind", "gqa"), KINDS)
def test_a_state_cut_for_another_tp_size_goes_on_alike(kind, gqa, before, after, importance):
    settings = {"gqa": gqa, "importance": importance, "statistics": "lagged"}
    saved = [after_two_steps(kind, shard=s, num_shards=before, **settings) for s in range(before)]
    for part in saved:
        choose(part, 3, number=3, interval=3)  # measures for step 4
    whole = joined(saved)

    resumed = [SmallModule(kind, shard=s, num_shards=after, **settings) for s in range(after)]
    for part in resumed:
        part.chooser.load_state(cut_for(part, whole))
    visits = [torch.cat([part.chooser.visits for part in parts]) for parts in (saved, resumed)]
    assert torch.equal(*visits)
    chosen = []
    for parts in (saved, resumed):
        chosen.append(torch.zeros(0, dtype=torch.uint8))
        for part in parts:
            choose(part, 4, number=4, interval=3)
        chosen[-1] = joined(parts)["kept"]
    assert torch.equal(*chosen)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (4, 2)])
@pytest.mark.parametrize(("kind", "gqa"), KINDS)
def test_a_choice_held_in_mid_interval_is_held_at_another_tp_size(kind, gqa, before, after):
    saved = [after_two_steps(kind, gqa=gqa, shard=s, num_shards=before) for s in range(before)]
    whole = joined(saved)
    resumed = [SmallModule(kind, gqa=gqa, shard=s, num_shards=after) for s in range(after)]
    for part in resumed:
        part.chooser.load_state(cut_for(part, whole))
        choose(part, 3, number=99, interval=3)

    assert torch.equal(joined(resumed)["kept"], whole["kept"])
    assert [part.asked for part in resumed] == [[]] * after


@pytest.mark.parametrize("changed", [{"selection_groups": 2}, {"selection_groups": 8}])
def test_a_choice_made_under_other_quotas_is_dropped(changed):
    resumed = SmallModule(**changed)
    resumed.chooser.load_state(after_two_steps().chooser.state())

    assert choose(resumed, 3, number=3, interval=3) == choose(SmallModule(**changed), 1, number=3)
    assert resumed.asked == ["inputs"]


def test_a_choice_of_another_count_is_chosen_again():
    resumed = SmallModule()
    resumed.chooser.load_state(after_two_steps().chooser.state())

    chosen = choose(resumed, 3, number=3, interval=3, rate=Fraction(1, 4))
    assert len(chosen or []) == 12


def test_sums_of_another_metric_are_dropped():
    saved = SmallModule(importance="maxip", **LAGGED)
    choose(saved, 1)
    resumed = SmallModule(importance="wanda", **LAGGED)
    resumed.chooser.load_state(saved.chooser.state())

    chosen = choose(resumed, 2, number=5)
    assert chosen == choose(SmallModule(importance="wanda"), 2, number=5)


@pytest.mark.parametrize("statistics", ["fresh", "lagged"])
@pytest.mark.parametrize("importance", METRICS)
def test_names_and_shapes_do_not_depend_on_what_has_happened(importance, statistics):
    new, used = (
        build("mlp", importance=importance, statistics=statistics) for build in (SmallModule, after_two_steps)
    )
    choose(used, 3, interval=3)

    described = [
        {name: (t.shape, t.dtype, t.device) for name, t in module.chooser.state().items()}
        for module in (new, used)
    ]
    assert described[0] == described[1]
    assert all(tensor.numel() > 0 for tensor in new.chooser.state().values())
    assert new.chooser.sharded_state <= new.chooser.state().keys()


def test_a_new_selector_reads_back_as_new():
    reloaded = SmallModule(**LAGGED)
    reloaded.chooser.load_state(SmallModule(**LAGGED).chooser.state())

    assert choose(reloaded, 1) == choose(SmallModule(**LAGGED), 1)
    assert reloaded.asked == ["inputs"]


def test_a_state_is_a_snapshot_that_later_steps_do_not_change():
    module = after_two_steps(**LAGGED)
    choose(module, 3, interval=3)
    state = module.chooser.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    resumed = SmallModule(**LAGGED)
    resumed.chooser.load_state(state)
    for step in (4, 5, 6):
        choose(module, step, number=step, interval=3)
        choose(resumed, step, number=step, interval=3)

    assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize(("saved", "model"), [("group", "head"), ("head", "group")])
def test_a_choice_among_other_units_is_refused(saved, model):
    state = after_two_steps("attention", gqa=saved).chooser.state()
    units = {"group": 8, "head": 16}

    message = (
        rf"choice of attention 3 must be of {units[model]} units a shard, as .*, got {units[saved]}; resume"
    )
    with pytest.raises(ValueError, match=message):
        SmallModule("attention", gqa=model).chooser.load_state(state)
