"""Mixed growing of units against lists and sorting, and what a selector makes of it."""

import math
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from megatron_sat.sparsity.growing import Growing, change_of, regrow, replaced_share
from megatron_sat.sparsity.neurons import Kept
from tests.helpers.choosing import SmallModule, choose, in_step, tokens_of

LAST = 100


def literal(
    scores: list[float], noise: list[float], before: list[int], *, keep: int, growing: Growing, step: int
) -> list[int]:
    """One group: drop the worst of the kept, let the best of the others grow, then random ones."""
    share = growing.replaced / 2 * (1 + math.cos(math.pi * (step - 1) / growing.last_step))
    pruned = max(int(len(before) * share), len(before) - keep)
    grown = keep - len(before) + pruned
    best_first = sorted(before, key=lambda unit: (-scores[unit], unit))
    staying = best_first[: len(before) - pruned]
    chosen = list(staying)
    for number, values in ((int(grown * (1 - growing.random_share)), scores), (None, noise)):
        number = keep - len(chosen) if number is None else number
        left = [unit for unit in range(len(scores)) if unit not in chosen]
        left.sort(key=lambda unit: (unit in before, -values[unit], unit))
        chosen += left[:number]
    return sorted(chosen)


def drawn(seed: int, units: int) -> Tensor:
    return torch.rand(units, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("step", [1, 41, 99])
@pytest.mark.parametrize("random_share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("had", "keep"), [(10, 10), (16, 4), (4, 16), (20, 12), (3, 20), (20, 20), (6, 5)])
def test_a_change_is_dropping_and_growing_written_out(had: int, keep: int, random_share: float, step: int) -> None:
    growing = Growing(replaced=0.6, random_share=random_share, last_step=LAST)
    groups, units = 2, 20
    scores, noise = drawn(1, groups * units), drawn(2, groups * units)
    scores[3] = scores[7]  # equal scores go to the lower index
    parts = [sorted(drawn(3 + group, units).argsort()[:had].tolist()) for group in range(groups)]
    index = torch.tensor([unit + units * group for group, part in enumerate(parts) for unit in part])
    before = None if had == units else Kept(index=index, units=groups * units)
    found = regrow(scores, before=before, groups=groups, keep=keep, growing=growing, step=step, noise=noise)
    expected = []
    for group, part in enumerate(parts):
        mine = slice(group * units, (group + 1) * units)
        chosen = literal(scores[mine].tolist(), noise[mine].tolist(), part, keep=keep, growing=growing, step=step)
        expected += [unit + units * group for unit in chosen]
    assert found.tolist() == expected


def test_the_share_that_is_replaced_falls_with_a_cosine_to_nothing() -> None:
    shares = [replaced_share(step, replaced=0.3, last_step=LAST) for step in (0, 50, 100)]
    assert shares == pytest.approx([0.3, 0.15, 0.0])
    assert change_of(10, wanted=10, share=0.3, random_share=0.25) == change_of(
        10, wanted=10, share=0.39, random_share=0.25
    ), "whole units, rounded down"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"replaced": 1.0}, r"--mst-replaced must be in \[0, 1\), got 1.0; MST uses 0.3"),
        ({"random_share": -0.1}, r"--mst-random-share must be in \[0, 1\], got -0.1; MST uses 0.25"),
    ],
)
def test_shares_that_are_none_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Growing(**{"replaced": 0.3, "random_share": 0.25} | settings, last_step=LAST)  # type: ignore[arg-type]


def module_of(*args: Literal["mlp", "attention"], replaced: float = 0.9, **changes: Any) -> SmallModule:
    """Groups of 4 channels, of which one of two is replaced at each change."""
    growing = Growing(replaced=replaced, random_share=0.5, last_step=LAST)
    return SmallModule(*args, selection="mixed-growing", growing=growing, importance="maxip", **changes)


def test_a_selector_replaces_a_share_of_its_last_choice_and_keeps_the_rest() -> None:
    module = module_of()
    first, second, third = (choose(module, step) for step in (1, 2, 3))
    assert first is not None and second is not None and third is not None
    assert [len(set(first) & set(second)), len(set(second) & set(third))] == [4, 4]
    still = module_of(replaced=0.0)
    assert choose(still, 1) == choose(still, 2)


def test_within_an_interval_a_choice_stays() -> None:
    module = module_of()
    chosen = [choose(module, step, interval=3, number=step) for step in range(1, 7)]
    assert chosen[0] == chosen[1] == chosen[2] != chosen[3] == chosen[4] == chosen[5]


def test_a_selector_that_goes_on_from_a_checkpoint_replaces_the_same() -> None:
    module, resumed, fresh = module_of(), module_of(), module_of()
    choose(module, 1)
    resumed.chooser.load_state(module.chooser.state())
    second = choose(module, 2)
    assert choose(resumed, 2) == second
    assert choose(fresh, 2) != second, "which it owes to the choice before it"


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_with_selection_groups_any_number_of_shards_replaces_the_same(kind: Literal["mlp", "attention"]) -> None:
    def course(shards: int) -> list[list[int]]:
        modules = [module_of(kind, shard=shard, num_shards=shards) for shard in range(shards)]
        found = []
        for step in (1, 2, 3):
            parts = [choose(module, step) or [] for module in modules]
            units = [module.chooser.neurons.units for module in modules]
            found.append([u + shard * units[shard] for shard, part in enumerate(parts) for u in part])
        return found

    assert course(1) == course(2) == course(4)


def test_after_a_dense_stretch_the_first_choice_is_of_all_units() -> None:
    module, fresh = module_of(), module_of()
    with in_step(module, 1, rate=Fraction(0)) as selector:
        assert module.forward(tokens_of(1)) is None
        assert selector.keeps_all
    assert choose(module, 2) == choose(fresh, 2)
