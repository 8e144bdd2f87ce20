"""The step as all sparse modules see it: one rate, one moment of choosing, one record of what was kept.

The controller takes the modules that carry a `Selector` through each `step`, and answers for logs, plots and
frozen neurons. It computes nothing itself.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module, Parameter

from megatron_sat.sparsity.compact import Packing
from megatron_sat.sparsity.neurons import Kept
from megatron_sat.sparsity.noise import Noise
from megatron_sat.sparsity.selector import Selector

Entry = tuple[Parameter, int, Tensor]
"""A parameter, a dimension, and the indices along it."""


class Schedule(Protocol):
    """The omission rate as a pure function of the step (see `schedule`)."""

    def rate(self, step: int) -> Fraction: ...

    @property
    def last_step(self) -> int: ...


class SparseModule(Protocol):
    """What the controller asks of an attention or MLP."""

    selector: Selector | None

    def entries(self, index: Tensor) -> list[Entry]:
        """The entries of this module's parameters that belong to the units ``index`` alone."""
        ...


def sparse_modules(chunks: Iterable[Module]) -> list[SparseModule]:
    """The modules with a selector in the model chunks of this rank, in the model's order."""
    found: list[Any] = [module for chunk in chunks for module in chunk.modules()]
    return [module for module in found if isinstance(getattr(module, "selector", None), Selector)]


class Controller:
    """Takes all sparse modules of this rank through the steps of a schedule."""

    def __init__(self, modules: Iterable[SparseModule], *, schedule: Schedule, interval: int) -> None:
        """interval: steps that a choice is kept, at least 1."""
        self.schedule, self.interval = schedule, interval
        self._modules = [(module, module.selector) for module in modules if module.selector is not None]
        self._omitted: dict[int, tuple[Kept, list[Entry]]] = {}
        self._noise = Noise()
        for selector in self.selectors:
            selector.draw_with(self._noise)

    @property
    def selectors(self) -> list[Selector]:
        return [selector for _, selector in self._modules]

    @contextmanager
    def step(self, step: int, *, micro_batches: int | None = None) -> Iterator[None]:
        """Step ``step`` (from 1): inside, forwards are sparse at the schedule's rate; outside, dense.

        micro_batches: of each module in this step, for layers to pack their weights for; None: they gather.
        A step whose body raises counts no visits, and leaves the modules dense too.
        """
        following = min(step + 1, self.schedule.last_step)
        rate, next_rate = self.schedule.rate(step), self.schedule.rate(following)
        draw, next_draw = self._draw(step), self._draw(following)
        self._noise.following = next_draw if next_rate else None
        packing = None if micro_batches is None else Packing(uses=micro_batches)
        try:
            for selector in self.selectors:
                selector.begin_step(
                    rate=rate, draw=draw, next_rate=next_rate, next_draw=next_draw, packing=packing
                )
            yield
            for selector in self.selectors:
                selector.count_visits()
        finally:
            for selector in self.selectors:
                selector.end_step()

    def forget(self) -> None:
        """Between two steps: drop what was chosen and measured; the next step chooses from its own tokens."""
        for selector in self.selectors:
            selector.forget()

    def _draw(self, step: int) -> int:
        """The first step of the selection interval that ``step`` lies in."""
        return step - (step - 1) % self.interval

    def omission_rates(self, step: int) -> dict[str, float]:
        """By kind of module ("attention", "mlp"), the share of this rank's units that ``step`` leaves out.

        That is after quotas and floors; a kind without sparse modules has no entry.
        """
        rate = self.schedule.rate(step)
        kept, units = defaultdict[str, int](int), defaultdict[str, int](int)
        for selector in self.selectors:
            kept[selector.place.kind] += selector.count(rate)
            units[selector.place.kind] += selector.neurons.units
        return {kind: float(1 - Fraction(kept[kind], units[kind])) for kind in units}

    def kept(self) -> dict[str, Kept | None]:
        """By "kind.layer", what is kept in the step under way; None: everything, or not chosen yet."""
        return {f"{s.place.kind}.{s.place.layer}": s.choice for s in self.selectors}

    def omitted_entries(self) -> Iterator[Entry]:
        """The parameter entries that take no part in the step under way: what `frozen` must hold still.

        As long as a choice stays, its indices are the same tensors.
        """
        for number, (module, selector) in enumerate(self._modules):
            choice = selector.choice
            if choice is None:
                self._omitted.pop(number, None)
                continue
            known = self._omitted.get(number)
            # another choice may lie in the same tensor (`layers.choosing`), but it is another object
            if known is None or known[0] is not choice:
                known = self._omitted[number] = choice, module.entries(choice.omitted())
            yield from known[1]

    def filled_entries(self) -> Iterator[Entry]:
        """The only entries of sparse weights and biases that get a gradient in the step under way, ascending.

        Not the rest of `omitted_entries` where units share rows (keys and values of heads that leave singly): those
        are filled though they belong to no unit alone.
        """
        for module, selector in self._modules:
            choice = selector.choice
            if choice is None:
                continue
            rows = selector.neurons.kept_rows(choice.index)
            for parameter, dim, index in module.entries(choice.index):
                yield parameter, dim, rows if dim == 0 else index

    def visits(self) -> dict[str, Tensor]:
        """By "kind.layer", in how many steps each unit of this shard was kept. int32 [units]."""
        return {f"{s.place.kind}.{s.place.layer}": s.visits for s in self.selectors}
