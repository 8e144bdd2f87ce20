"""A last look at an update before it is made: with the loss and the gradient's norm known, weights and moments as yet
untouched.

megatron.core computes the norm inside `step()`, between unscaling and the update, and hands it out afterwards. So the
two methods that enclose the moment are wrapped on the instance: the one that gives the norm is listened to, the one
that updates is asked for leave. An update without leave returns as one that overflowed does: nothing moved.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

Verdict = Callable[[float, float | None], bool]
"""(loss, gradient norm; None where nothing clips and so nothing computes it): whether the update may be made."""


@runtime_checkable
class Judged(Protocol):
    """An engine that can ask before it updates, and knows its micro-batches' losses."""

    def judge(self, verdict: Verdict) -> None:
        """Before each coming update ask ``verdict``, on every rank that has something to update. Without its leave on
        any replica the step leaves weights, moments and learning-rate schedule as they were, and is `skipped`."""

    @property
    def micro_batch_losses(self) -> list[float]:
        """Of the last training step, the mean loss of each micro-batch of this rank; empty but on the last stage."""


def pass_over(optimizer: MegatronOptimizer, *, when: Callable[[], bool]) -> None:
    """Before each coming update ask `when`; where it says so, nothing is updated, and the step counts as one that was.

    All ranks must say the same. Whoever wraps the update later (`Veto`) is asked first.
    """
    update = optimizer.step_with_ready_grads

    def asked() -> bool:
        return True if when() else bool(update())

    optimizer.step_with_ready_grads = asked  # type: ignore[method-assign]


def permitted(mine: bool, *, replicas: dist.ProcessGroup) -> bool:
    """Whether every replica permits the update; collective."""
    refused = torch.tensor([0.0 if mine else 1.0], device=torch.cuda.current_device())
    dist.all_reduce(refused, op=dist.ReduceOp.MAX, group=replicas)
    return not refused.item()


class Veto:
    """Asks before each update of one optimizer."""

    def __init__(self, optimizer: MegatronOptimizer, *, verdict: Verdict, replicas: dist.ProcessGroup) -> None:
        """replicas: ranks with the same part of the model, which must decide alike."""
        self.loss = 0.0
        """Of the step under way; whoever steps the optimizer sets it."""
        self._verdict, self._replicas = verdict, replicas
        self._norm: float | None = None
        for name in ("get_grad_norm", "clip_grad_norm"):
            if hasattr(optimizer, name):
                setattr(optimizer, name, self._listening(getattr(optimizer, name)))
        self._update = optimizer.step_with_ready_grads
        optimizer.step_with_ready_grads = self._ask  # type: ignore[method-assign]

    def _listening(self, norm_of: Callable[..., Any]) -> Callable[..., Any]:
        def listened(*args: Any, **kwargs: Any) -> Any:
            norm = norm_of(*args, **kwargs)
            self._norm = None if norm is None else float(norm)
            return norm

        return listened

    def _ask(self) -> bool:
        norm, self._norm = self._norm, None
        return permitted(self._verdict(self.loss, norm), replicas=self._replicas) and bool(self._update())
