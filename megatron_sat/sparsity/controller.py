"""The step as all sparse modules see it: one rate, one moment of choosing, one record of what was kept.

The controller finds the modules that carry a `Selector`, takes them through `step`, and answers for logs, plots, frozen
neurons and checkpoints. It computes nothing itself.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Protocol

from torch import Tensor
from torch.nn import Module, Parameter

from megatron_sat.sparsity.neurons import Kept
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
    return [module for chunk in chunks for module in chunk.modules() if getattr(module, "selector", None) is not None]  # type: ignore[misc]


class Controller:
    """Takes all sparse modules of this rank through the steps of a schedule."""

    def __init__(self, modules: Iterable[SparseModule], *, schedule: Schedule, interval: int) -> None:
        """interval: steps that a choice is kept."""
        self.schedule, self.interval = schedule, interval
        self._modules = [(module, module.selector) for module in modules if module.selector is not None]

    @property
    def selectors(self) -> list[Selector]:
        return [selector for _, selector in self._modules]

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Step ``step`` (from 1): inside, forwards are sparse at the schedule's rate; outside they are dense."""
        following = min(step + 1, self.schedule.last_step)
        for selector in self.selectors:
            selector.begin_step(
                rate=self.schedule.rate(step),
                draw=self._draw(step),
                next_rate=self.schedule.rate(following),
                next_draw=self._draw(following),
            )
        try:
            yield
        finally:
            for selector in self.selectors:
                selector.end_step()

    def _draw(self, step: int) -> int:
        """The first step of the selection interval that ``step`` lies in."""
        return step - (step - 1) % self.interval

    def omission_rates(self, step: int) -> dict[str, float]:
        """By kind of module ("attention", "mlp"), the share that is really left out at ``step``, floors included."""
        rates: dict[str, float] = {}
        for selector in self.selectors:
            kept = Fraction(selector.count(self.schedule.rate(step)), selector.neurons.units)
            rates[selector.place.kind] = float(1 - kept)
        return rates

    def kept(self) -> dict[str, Kept | None]:
        """By "kind.layer", what is kept in the step under way; None: everything."""
        return {f"{s.place.kind}.{s.place.layer}": s.choice for s in self.selectors}

    def omitted_entries(self) -> Iterator[Entry]:
        """The parameter entries that take no part in the step under way: what `frozen` must hold still."""
        for module, selector in self._modules:
            if selector.choice is not None:
                yield from module.entries(selector.choice.omitted())

    def visits(self) -> dict[str, Tensor]:
        """By "kind.layer", how many steps each unit of this shard was kept. int32 [units]."""
        return {f"{s.place.kind}.{s.place.layer}": s.visits for s in self.selectors}
