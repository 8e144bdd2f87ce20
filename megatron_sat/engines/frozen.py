"""Entries that sit an update out: weights and optimizer state bit-identical before and after it (the paper's eq. 2).

A zero gradient is not enough: momentum and weight decay still move an entry. So the held entries of the
weights that the inner torch optimizer steps on, and of every state tensor beside them, are copied before its
step and written back after it. This costs one transient copy of what is held, and nothing where nothing is. What
depends on the choice alone is worked out once a choice (`held`), and the host waits for no device in between.

Where the optimizer has a parameter, whole or in part, `stretch` says. The model's own 16-bit weights follow, being
rounded from copies that did not change.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from megatron_sat.aside.copies import Copies
from megatron_sat.aside.lines import Lines
from megatron_sat.engines.base import Held
from megatron_sat.engines.held import HeldParts, Part
from megatron_sat.engines.stretch import Find, stretches_of_megatron


def hold_entries(optimizer: MegatronOptimizer, *, entries: Callable[[], Iterable[Held]]) -> None:
    """Before each step of `optimizer` ask `entries` what must not move, and see to it.

    entries: called once a step on every inner optimizer; parameters that belong to another one are passed over.
    Raises ValueError for an optimizer whose state cannot be held entry by entry.
    """
    inner = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for wrapper in inner:
        if getattr(wrapper, "is_stub_optimizer", False):
            continue
        _refuse_unknown(wrapper)
        hold_stretches(wrapper.optimizer, find=stretches_of_megatron(wrapper), entries=entries)


def hold_stretches(optimizer: torch.optim.Optimizer, *, find: Find, entries: Callable[[], Iterable[Held]]) -> None:
    """The same for one torch optimizer. entries: called before each of its steps, and there may be several an update
    (DeepSpeed's go group by group); what the step's parameter groups do not hold is passed over."""
    optimizer.register_step_pre_hook(lambda *_: holder.copy())
    optimizer.register_step_post_hook(lambda *_: holder.write_back())
    holder = _Holder(optimizer, find, entries)


def _refuse_unknown(wrapper: MegatronOptimizer) -> None:
    if not isinstance(wrapper, FP32Optimizer | Float16OptimizerWithFloat16Params | DistributedOptimizer):
        raise ValueError(
            "held entries need --optimizer adam or sgd in one of megatron.core's three wrappers, got "
            f"{type(wrapper).__name__}; pass --sat-omitted-neurons optimizer"
        )
    if isinstance(wrapper.optimizer, HybridDeviceOptimizer):
        raise ValueError(
            "held entries need the optimizer state on one device, got --optimizer-cpu-offload; leave it out "
            "or pass --sat-omitted-neurons optimizer"
        )
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        dtype = getattr(wrapper.config, name)
        if dtype.itemsize == 1:
            raise ValueError(
                f"held entries need optimizer state without a shared scale, got --{name.replace('_', '-')} "
                f"{dtype}: its scale changes with every step; use bf16 or fp32, or pass "
                "--sat-omitted-neurons optimizer"
            )


class _Holder:
    """What happens before and after a step of one torch optimizer, and what the first passes to the second."""

    def __init__(self, optimizer: torch.optim.Optimizer, find: Find, entries: Callable[[], Iterable[Held]]) -> None:
        self._optimizer = optimizer
        self._find = find
        self._entries = entries
        self._held: dict[frozenset[int], _Turn] = {}  # DeepSpeed's groups take turns
        self._turn = _Turn(HeldParts(), Copies())

    def copy(self) -> None:
        own = frozenset(id(main) for group in self._optimizer.param_groups for main in group["params"])
        self._turn = turn = self._held.setdefault(own, _Turn(HeldParts(), Copies()))
        turn.parts = turn.held.of(self._entries(), find=self._find, own=own)
        turn.names = {id(part.stretch.main): list(self._state_of(part)) for part in turn.parts}
        turn.copies.copy(self._lines())

    @torch.no_grad()
    def write_back(self) -> None:
        self._turn.copies.write_back(self._lines())
        for part in self._turn.parts:
            for name, tensor in self._state_of(part).items():
                if name not in self._turn.names[id(part.stretch.main)]:
                    # the step that makes the state: what took no part in it has no history
                    part.of(tensor).grid.index_fill_(part.dim, part.index, 0)

    def _lines(self) -> Iterator[Lines]:
        """Of weights, and of each state tensor that was there before the step, as it lies now."""
        for part in self._turn.parts:
            yield part.of(part.stretch.main)
            state = self._state_of(part)
            for name in self._turn.names[id(part.stretch.main)]:
                yield part.of(state[name])

    def _state_of(self, part: Part) -> dict[str, Tensor]:
        return state_of(self._optimizer, part.stretch.main)


@dataclass(eq=False)
class _Turn:
    """What is remembered of the steps of the same parameters, and of the one under way."""

    held: HeldParts
    copies: Copies
    parts: list[Part] = field(default_factory=list)
    names: dict[int, list[str]] = field(default_factory=dict)
    """By a tensor's id, the state it had before the step."""


def state_of(optimizer: torch.optim.Optimizer, main: Tensor) -> dict[str, Tensor]:
    """Optimizer state of ``main`` with a value for each entry: the moments, not the step count."""
    state = optimizer.state
    if main not in state:
        return {}
    return {name: v for name, v in state[main].items() if isinstance(v, Tensor) and v.shape == main.shape and v.dim()}
