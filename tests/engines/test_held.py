"""Held entries by part of an optimizer's tensor: the parts are right, and a choice that stays costs no look at it."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sat.engines.base import Held
from megatron_sat.engines.frozen import hold_stretches
from megatron_sat.engines.held import HeldParts
from megatron_sat.engines.stretch import Find, Stretch

ROWS, COLUMNS = 6, 5
DATA_DEPENDENT = {"aten::nonzero", "aten::_local_scalar_dense", "aten::index", "aten::masked_select", "aten::unique"}
"""What a GPU makes the host wait for: a size, or a number, that is computed there."""
VIEWS = {"aten::view", "aten::slice", "aten::detach", "aten::as_strided", "aten::split_with_sizes", "aten::split"}


class Recorded(TorchDispatchMode):
    """Counts torch's operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def stretch_of(parameter: Parameter, main: Tensor, *, offset: int, start: int, length: int) -> Stretch:
    return Stretch(main=main, offset=offset, start=start, length=length, shape=parameter.shape)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_parts_are_the_held_entries_that_lie_in_the_stretch_wherever_it_begins_and_ends(dim: int) -> None:
    parameter = Parameter(torch.empty(ROWS, COLUMNS))
    index = torch.tensor([4, 0, 3])
    held = torch.zeros(ROWS, COLUMNS, dtype=torch.bool).index_fill_(dim, index, True).flatten()
    main = torch.empty(2 + ROWS * COLUMNS)
    for start in range(ROWS * COLUMNS):
        for end in range(start + 1, ROWS * COLUMNS + 1):
            where = stretch_of(parameter, main, offset=2, start=start, length=end - start)
            parts = HeldParts().of([(parameter, dim, index)], find=lambda _, found=where: found, own={id(main)})  # type: ignore[misc]
            seen = torch.zeros_like(main)
            for part in parts:
                seen_there = part.of(seen)
                seen_there.grid.index_add_(dim, part.index, torch.ones(seen_there.packed))
            expected = torch.zeros_like(main)
            expected[2 : 2 + end - start] = held[start:end].float()
            assert torch.equal(seen, expected), (start, end)


def model() -> tuple[list[Parameter], list[Held]]:
    """Four weights as two layers have them, and held rows and columns of them; one choice serves two of them."""
    torch.manual_seed(1)
    rows, columns = torch.tensor([1, 2, 5]), torch.tensor([0, 3])
    weights = [Parameter(torch.randn(ROWS, COLUMNS)) for _ in range(4)]
    return weights, [(weight, dim, (rows, columns)[dim]) for weight, dim in zip(weights, (0, 1, 0, 1), strict=True)]


def whole(parameters: list[Parameter]) -> tuple[torch.optim.Optimizer, Find]:
    """Adam on the weights themselves."""
    adam = torch.optim.AdamW(parameters, lr=0.1, foreach=True)
    return adam, lambda parameter: stretch_of(parameter, parameter, offset=0, start=0, length=parameter.numel())


def torn(parameters: list[Parameter]) -> tuple[torch.optim.Optimizer, Find]:
    """Adam on one flat shard that begins and ends inside a row of the first and the last weight, as ZeRO's do."""
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    first, last = 7, sum(sizes) - 8
    main = Parameter(flat[first:last].clone())
    starts = [sum(sizes[:number]) for number in range(len(sizes))]

    def find(parameter: Parameter) -> Stretch:
        number = next(n for n, own in enumerate(parameters) if own is parameter)
        begin, end = max(starts[number], first), min(starts[number] + sizes[number], last)
        return stretch_of(parameter, main, offset=begin - first, start=begin - starts[number], length=end - begin)

    return torch.optim.AdamW([main], lr=0.1, foreach=True), find


def update(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for main in group["params"]:
            main.grad = torch.ones_like(main)
    adam.step()


def recorded(adam: torch.optim.Optimizer) -> Counter[str]:
    """The operations of an update's two hooks, its own left out."""
    (before,), (after,) = adam._optimizer_step_pre_hooks.values(), adam._optimizer_step_post_hooks.values()
    with Recorded() as mode:
        before(adam, (), {})
        after(adam, (), {})
    return mode.counts


MAKERS = {"whole": whole, "torn": torn}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_an_update_with_an_unchanged_choice_takes_two_launches_a_part_and_lets_no_host_wait(
    kind: str, mask: bool
) -> None:
    weights, held = model()
    if mask:
        held = [(w, dim, torch.zeros(w.shape[dim], dtype=torch.bool).index_fill(0, i, True)) for w, dim, i in held]
    adam, find = MAKERS[kind](weights)
    hold_stretches(adam, find=find, entries=lambda: held)
    update(adam)  # makes the moments
    counts = recorded(adam)
    assert not DATA_DEPENDENT & set(counts)
    own = {id(main) for group in adam.param_groups for main in group["params"]}
    parts = len(HeldParts().of(held, find=find, own=own))
    assert parts == (4 if kind == "whole" else 6)  # the first and the last weight are torn in two each
    launches = {name: count for name, count in counts.items() if name not in VIEWS}
    # weight and two moments of each part; one piece of memory for all copies
    assert launches == {"aten::index_select": 3 * parts, "aten::index_copy_": 3 * parts, "aten::empty": 1}


@pytest.mark.parametrize(
    ("kind", "change"),
    [("torn", lambda index: index.clone()), ("whole", lambda index: torch.arange(4) < len(index))],
)
def test_a_new_choice_is_looked_at(kind: str, change: Callable[[Tensor], Tensor]) -> None:
    """The negative control: the same counters see what a cut, or a mask, makes the host wait for."""
    weights, held = model()
    adam, find = MAKERS[kind](weights)
    hold_stretches(adam, find=find, entries=lambda: held)
    update(adam)
    held = [(weight, dim, change(index)) for weight, dim, index in held]
    assert DATA_DEPENDENT & set(recorded(adam))


def test_other_entries_or_another_place_lead_to_other_parts() -> None:
    weight, other = Parameter(torch.randn(ROWS, COLUMNS)), Parameter(torch.randn(ROWS, COLUMNS))
    index, parts = torch.tensor([1, 2]), HeldParts()
    own = {id(weight), id(other)}
    place = {"offset": 0, "start": 0, "length": weight.numel()}
    mains = {id(weight): weight, id(other): other}

    def ask(*entries: Held) -> list[Any]:
        def find(parameter: Parameter) -> Stretch:
            return stretch_of(parameter, mains[id(parameter)], **place)

        return parts.of(entries, find=find, own=own)

    first = ask((weight, 0, index))
    assert ask((weight, 0, index)) is first
    changes: list[tuple[Held, ...]] = [
        ((weight, 0, index.clone()),),
        ((weight, 1, index),),
        ((other, 1, index),),
        ((other, 1, index), (weight, 1, index)),
        (),
    ]
    for entries in changes:
        before, now = parts._parts, ask(*entries)
        assert now is not before
        assert len(now) == len(entries)
    before = ask((weight, 0, index))
    for key, value in (("length", 20), ("start", 5), ("offset", 3)):
        place[key] = value
        now = ask((weight, 0, index))
        assert now is not before
        assert getattr(now[0].stretch, key) == value
        before = now
    mains[id(weight)] = other
    assert ask((weight, 0, index))[0].stretch.main is other
    own.remove(id(other))
    assert ask((weight, 0, index)) == []


def test_groups_that_are_updated_in_turn_do_not_make_each_other_forget() -> None:
    """DeepSpeed's step goes group by group, each with the others left out."""
    weights, held = model()
    adam, find = whole(weights)
    everything = [dict(adam.param_groups[0], params=[weight]) for weight in weights]
    masks = [(w, dim, torch.zeros(w.shape[dim], dtype=torch.bool).index_fill(0, i, True)) for w, dim, i in held]
    hold_stretches(adam, find=find, entries=lambda: masks)
    counts = Counter[str]()
    for round_ in range(2):
        for group in everything:
            adam.param_groups = [group]
            counts += recorded(adam) if round_ else Counter()
            update(adam)
    assert counts["aten::index_copy_"] == 4 * 3
    assert not DATA_DEPENDENT & set(counts)
