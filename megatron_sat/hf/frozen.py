"""Omitted neurons as eq. 2 has them: an update leaves their weights, and what is remembered of them, as they were.

Without this a zero gradient still moves them, by momentum and decay, as in standard training (section 2.3). The entries
are copied before the optimizer's step and written back after it, which costs one transient copy of what is omitted. It
serves any optimizer of torch that keeps its state in tensors of the parameter's shape; a counter of steps, of which
there is one for a whole tensor, goes on.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from megatron_sat.aside.copies import Copies
from megatron_sat.aside.lines import Lines, lines_of
from megatron_sat.sparsity.controller import Entry


class Freezer:
    """Holds still, in each step of an optimizer, the entries that are named just before it."""

    def __init__(self, optimizer: Optimizer, *, entries: Callable[[], Iterable[Entry]]) -> None:
        """entries: called before each step; (parameter, dim, index along it)."""
        self._optimizer, self._entries = optimizer, entries
        self._copies, self._lines = Copies(), list[Lines]()
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._copy()),
            optimizer.register_step_post_hook(lambda *_: self._write_back()),
        ]

    def remove(self) -> None:
        """Let the optimizer move everything again."""
        for hook in self._hooks:
            hook.remove()

    def _copy(self) -> None:
        self._lines = list(self._found())
        self._copies.copy(self._lines)

    def _write_back(self) -> None:
        self._copies.write_back(self._lines)
        self._lines.clear()

    def _found(self) -> Iterator[Lines]:
        for parameter, dim, index in self._entries():
            # state that is born in this step is what zero gradients make of nothing: it may stay
            remembered: Any = self._optimizer.state.get(parameter, {}).values()
            for tensor in (parameter, *remembered):
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                    yield lines_of(tensor, dim=dim, index=index)
