"""What a baseline that trains by masks does in a run, and where in a step: told which one comes, and called when the
step's gradients are summed over all ranks and not yet clipped.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from megatron.core.utils import get_model_config
from torch import Tensor
from torch.nn import Module, Parameter

Clear = Callable[[Iterable[tuple[Parameter, Tensor]]], None]
"""Zeroes entries in every copy that an update reads (`engines.cleared`)."""


class Course(Protocol):
    """A baseline at work. Every method is collective: all ranks call it together."""

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave for a checkpoint, whose weights and moments the engine has by now."""

    def start(self, step: int) -> None:
        """Before the first step of this process, ``step`` (from 1)."""

    def begin_step(self, step: int) -> None:
        """Before the forward of each step."""

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint after the step that was begun last."""


class NoCourse:
    """Of a run that is no baseline, or one that needs no masks."""

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Nothing is taken over."""

    def start(self, step: int) -> None:
        """Nothing to do."""

    def begin_step(self, step: int) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, Tensor]:
        """Nothing goes through a checkpoint."""
        return {}


def after_reduction(chunks: Sequence[Module], *, do: Callable[[], None]) -> None:
    """Call ``do`` once in each training step, after the gradients' reduction and before their norm is taken.

    chunks: of a built engine; their configuration names what Megatron's schedules run at that moment.
    """
    config: Any = get_model_config(chunks[0])
    finalize = config.finalize_model_grads_func

    def finalize_and_do(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        do()

    config.finalize_model_grads_func = finalize_and_do
