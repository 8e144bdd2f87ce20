"""The controller over small modules: steps of a schedule in, what was kept and omitted out."""

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Module

from megatron_sat.sparsity.controller import Controller, sparse_modules
from megatron_sat.sparsity.selection import keep_count
from megatron_sat.sparsity.selector import Selector
from tests.helpers.choosing import (
    CHANNELS,
    GROUPS,
    HEAD_DIM,
    PER_GROUP,
    WIDTH,
    SmallModule,
    choose,
    tokens_of,
)

RATES = [Fraction(1, 2), Fraction(1, 2), Fraction(1, 4), Fraction(0)]


@dataclass(frozen=True)
class Listed:
    """A schedule that is a list of rates."""

    rates: tuple[Fraction, ...] = tuple(RATES)

    def rate(self, step: int) -> Fraction:
        return self.rates[step - 1]

    @property
    def last_step(self) -> int:
        return len(self.rates)


def two_modules(**settings) -> list[SmallModule]:
    return [SmallModule("attention", layer=1, **settings), SmallModule("mlp", layer=1, **settings)]


def control(modules: list[SmallModule], *, interval: int = 1, rates: list[Fraction] = RATES) -> Controller:
    return Controller(modules, schedule=Listed(tuple(rates)), interval=interval)


def forward(modules: list[SmallModule], number: int = 1) -> list[list[int] | None]:
    return [module.forward(tokens_of(number)) for module in modules]


def test_inside_a_step_modules_are_sparse_at_its_rate_and_outside_dense():
    modules = two_modules()
    controller = control(modules)
    kept = [forward(modules)]
    for step in (1, 2, 3, 4):
        with controller.step(step):
            kept.append(forward(modules))
        kept.append(forward(modules))

    counts = [[None if index is None else len(index) for index in pair] for pair in kept]
    dense = [None, None]
    # 2 query groups a selection group: a quarter leaves one of them, like a half
    assert counts == [dense, [4, 8], dense, [4, 8], dense, [4, 12], dense, dense, dense]


def test_a_step_that_raises_leaves_every_module_dense_and_counts_no_visit():
    modules = two_modules()
    controller = control(modules)

    def fail() -> None:
        assert None not in forward(modules)
        raise KeyError("out of data")

    with pytest.raises(KeyError, match="out of data"), controller.step(1):
        fail()

    assert forward(modules) == [None, None]
    assert [visits.sum().item() for visits in controller.visits().values()] == [0, 0]
    assert [selector.visited_steps for selector in controller.selectors] == [0, 0]
    with controller.step(2):
        assert None not in forward(modules)


def test_a_step_that_no_schedule_has_changes_nothing():
    modules = two_modules()
    controller = control(modules)
    with pytest.raises(IndexError), controller.step(5):
        pass

    assert forward(modules) == [None, None]


def test_every_step_of_an_interval_draws_from_its_first():
    modules = two_modules(importance="uniform")
    controller = control(modules, interval=2, rates=[Fraction(1, 2)] * 6)
    chosen = []
    for step in range(1, 7):
        with controller.step(step):
            chosen.append(forward(modules))

    alone = [[choose(module, step) for module in two_modules(importance="uniform")] for step in (1, 3, 5)]
    assert chosen == [alone[0], alone[0], alone[1], alone[1], alone[2], alone[2]]
    assert alone[0] != alone[1] != alone[2]


def test_a_step_tells_lagged_modules_whether_the_next_one_chooses():
    modules = two_modules(statistics="lagged")
    controller = control(modules)
    asked = []
    for step in (1, 2, 3, 4):
        with controller.step(step):
            forward(modules)
        asked.append([len(module.asked) for module in modules])

    assert asked == [[1, 1], [2, 2], [2, 2], [2, 2]]  # step 3 is followed by a dense one


def test_the_last_step_measures_nothing_for_a_step_that_never_comes():
    modules = two_modules(statistics="lagged")
    controller = control(modules, rates=[Fraction(1, 2)] * 2)
    for step in (1, 2):
        with controller.step(step):
            forward(modules)

    assert [len(module.asked) for module in modules] == [1, 1]


def test_omission_rates_are_what_is_left_out_after_quotas_and_floors():
    controller = control(two_modules(), rates=[Fraction(3, 10), Fraction(0)])
    groups = 4 * keep_count(GROUPS // 4, Fraction(3, 10))
    channels = 4 * keep_count(CHANNELS // 4, Fraction(3, 10))

    expected = {"attention": 1 - groups / GROUPS, "mlp": 1 - channels / CHANNELS}
    assert controller.omission_rates(1) == expected == {"attention": 0.5, "mlp": 0.5}
    assert controller.omission_rates(2) == {"attention": 0.0, "mlp": 0.0}


def test_omission_rates_average_over_modules_of_one_kind():
    modules = [SmallModule(layer=1, selection_groups=4), SmallModule(layer=2, selection_groups=1)]
    controller = control(modules, rates=[Fraction(3, 10)])

    assert controller.omission_rates(1) == {"mlp": 1 - (8 + 11) / 32}
    assert control([]).omission_rates(1) == {}


def test_what_is_kept_is_told_by_kind_and_layer_while_the_step_lasts():
    modules = two_modules()
    controller = control(modules)
    assert controller.kept() == {"attention.1": None, "mlp.1": None}
    with controller.step(1):
        assert controller.kept() == {"attention.1": None, "mlp.1": None}
        chosen = forward(modules)
        kept = controller.kept()

    assert [None if k is None else k.index.tolist() for k in kept.values()] == chosen
    assert controller.kept() == {"attention.1": None, "mlp.1": None}


def test_visits_add_up_to_what_every_step_kept():
    modules = two_modules()
    controller = control(modules)
    counted = {"attention.1": [0] * GROUPS, "mlp.1": [0] * CHANNELS}
    for step in (1, 2, 3, 4):
        with controller.step(step):
            chosen = forward(modules, number=step)
        for visits, index in zip(counted.values(), chosen, strict=True):
            for unit in range(len(visits)) if index is None else index:
                visits[unit] += 1

    assert {name: visits.tolist() for name, visits in controller.visits().items()} == counted


def omitted_masks(controller: Controller, modules: list[SmallModule]) -> list[Tensor]:
    """1 for every entry of each parameter that the controller calls omitted, told apart by identity."""
    parameters = [parameter for module in modules for parameter in (module.column, module.row)]
    masks = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, dim, index in controller.omitted_entries():
        (place,) = [at for at, own in enumerate(parameters) if own is parameter]
        masks[place].index_fill_(dim, index, 1)
    return masks


def test_omitted_entries_are_the_rows_and_columns_of_all_that_was_not_kept():
    modules = two_modules()
    controller = control(modules)
    with controller.step(1):
        groups, channels = forward(modules)
        masks = omitted_masks(controller, modules)

    assert groups is not None
    assert channels is not None
    qkv = torch.ones(GROUPS, (PER_GROUP + 2) * HEAD_DIM, WIDTH)
    proj = torch.ones(WIDTH, GROUPS, PER_GROUP * HEAD_DIM)
    qkv[groups], proj[:, groups] = 0, 0
    gate_up, down = torch.ones(2, CHANNELS, WIDTH), torch.ones(WIDTH, CHANNELS)
    gate_up[:, channels], down[:, channels] = 0, 0
    expected = [qkv.view(-1, WIDTH), proj.view(WIDTH, -1), gate_up.view(-1, WIDTH), down]
    assert all(torch.equal(mask, twin) for mask, twin in zip(masks, expected, strict=True))


def test_keys_and_values_are_never_omitted_where_heads_leave_singly():
    modules = [SmallModule("attention", gqa="head")]
    controller = control(modules)
    with controller.step(1):
        forward(modules)
        qkv, _ = omitted_masks(controller, modules)

    blocks = qkv.view(GROUPS, PER_GROUP + 2, HEAD_DIM, WIDTH)
    assert not blocks[:, PER_GROUP:].any()
    assert blocks[:, :PER_GROUP].sum() == GROUPS * PER_GROUP // 2 * HEAD_DIM * WIDTH


def test_nothing_is_omitted_outside_a_step_in_a_dense_one_or_before_the_choice():
    modules = two_modules()
    controller = control(modules)
    with controller.step(1):
        assert list(controller.omitted_entries()) == []
        forward(modules)
    assert list(controller.omitted_entries()) == []
    with controller.step(4):
        forward(modules)
        assert list(controller.omitted_entries()) == []


def test_omitted_entries_are_the_same_tensors_as_long_as_a_choice_stays_and_new_ones_after():
    modules = two_modules()
    controller = control(modules, interval=2, rates=[Fraction(1, 2)] * 4)
    asked = []
    for step in (1, 2, 3, 4):
        with controller.step(step):
            forward(modules, number=step)
            asked.append([index for _, _, index in controller.omitted_entries()])

    first, second, third, fourth = asked
    assert len(first) == 4
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert all(one is other for one, other in zip(third, fourth, strict=True))
    assert not any(one is other for one, other in zip(second, third, strict=True))


def test_a_choice_that_lies_where_the_one_before_lay_is_another_choice():
    """As a recorded choice does: it fills the same tensor anew."""
    module = SmallModule()
    controller = control([module], rates=[Fraction(1, 2)] * 2)
    assert module.selector is not None
    index = torch.arange(0, CHANNELS, 2)
    omitted = []
    for step in (1, 2):
        with controller.step(step):
            index.copy_(torch.arange(step - 1, CHANNELS, 2))
            module.selector.settle(torch.ones(WIDTH + 1), pick=lambda sums, noise: index)
            omitted.append([entry[2].tolist() for entry in controller.omitted_entries()][1])

    assert omitted == [list(range(1, CHANNELS, 2)), list(range(0, CHANNELS, 2))]


class Layer(Module):
    """A torch module that may carry a selector, and something else of that name."""

    def __init__(self, selector: Selector | str | None) -> None:
        super().__init__()
        self.selector, self.inner = selector, Linear(1, 1)


def test_sparse_modules_are_those_with_a_selector_in_the_models_order():
    first, second = (SmallModule(layer=layer).chooser for layer in (1, 2))
    chunks = [
        torch.nn.Sequential(Layer(None), Layer(first)),
        torch.nn.Sequential(Layer("text"), Layer(second)),
    ]

    assert [module.selector for module in sparse_modules(chunks)] == [first, second]


def test_a_controller_passes_over_modules_without_a_selector():
    bare = SmallModule()
    bare.selector = None
    controller = control([bare, SmallModule(layer=2)])

    assert [selector.place.layer for selector in controller.selectors] == [2]
