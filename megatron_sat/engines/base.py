"""The engine protocol: what the training loop asks of whoever moves the gradients.

An engine owns the wrapped model, the optimizer and the learning-rate schedule. It runs whole steps (all micro-batches
forward and backward, the reduction over data parallel, the update) and passes without a gradient; it hands its state to
a checkpoint and takes it back. It does not know which modules the model is made of.

Shapes: `b` micro-batch, `s` sequence, `cp` context-parallel size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
"""One micro-batch of one data-parallel rank: tokens, labels, position_ids, loss_mask, each [b, s/cp]."""

Forward = Callable[[torch.nn.Module, Batch], Tensor]
"""One micro-batch through one model chunk: the loss of each token [b, s/cp] on the last pipeline stage,
hidden states for the next stage on the others."""

Held = tuple[torch.nn.Parameter, int, Tensor]
"""(parameter, dim, index): entries of this rank's parameter that one update must leave alone. index: int64
rows (dim 0) or columns (dim 1), distinct, or a bool mask over that dim. A tensor that is handed over again, the same
object, means the same entries as before: nobody wrote to it."""

Filled = tuple[torch.nn.Parameter, int, Tensor]
"""(parameter, dim, index): the only entries of this rank's parameter whose gradient may be other than zero in the step
under way, the same on all its data- and context-parallel ranks. index: int64 rows (dim 0) or columns (dim 1),
ascending, without repetition."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one update was, the same on every rank."""

    loss: float
    """Mean over the unmasked tokens of the global batch, before the update."""
    num_tokens: int
    """Unmasked tokens of the global batch."""
    grad_norm: float
    """Norm of the whole gradient before clipping; NaN when the update was skipped for an overflow."""
    learning_rate: float
    """The rate that this update used."""
    skipped: bool
    """The gradients overflowed (fp16): nothing was updated and the schedule did not advance."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A loss without an update, the same on every rank."""

    loss: float
    """Mean over the unmasked tokens that all data-parallel ranks read."""
    num_tokens: int


def forward_tokens(model: torch.nn.Module, batch: Batch) -> Tensor:
    """The usual `Forward`: a causal language model that computes its own loss.

    Returns [b, s/cp] (last stage) or hidden states (earlier stages).
    """
    mask = batch.get("attention_mask")
    return model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])


def masked_sum(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """losses: [b, s/cp]. Returns their sum over the unmasked tokens, and the number of those, both fp32."""
    mask = batch["loss_mask"].reshape(-1).float()
    return torch.sum(losses.reshape(-1).float() * mask), mask.sum()


def mean_losses(sums: Iterable[Tensor]) -> list[float]:
    """Of each micro-batch, from its [loss, tokens]; NaN where it has no unmasked token."""
    return [loss / tokens if tokens else math.nan for loss, tokens in (each.tolist() for each in sums)]


class Engine(Protocol):
    """What the training loop may ask. Every method is collective: all ranks call it together."""

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """This rank's model chunks as they were built, without the engine's wrappers."""

    @property
    def learning_rate(self) -> float:
        """The rate that the next update will use."""

    def train_step(
        self, micro_batches: Iterator[Batch], *, num_micro_batches: int, forward: Forward = forward_tokens
    ) -> StepResult:
        """Draw `num_micro_batches` from the iterator, sum their gradients, reduce, update, advance the schedule."""

    def evaluate(
        self, micro_batches: Iterator[Batch], *, num_micro_batches: int, forward: Forward = forward_tokens
    ) -> Evaluation:
        """The mean loss over `num_micro_batches` of every data-parallel rank; nothing changes."""

    def gather_weights(self) -> None:
        """Make this rank's weights whole now, where an engine leaves them in shards between an update and the forward
        that needs them (overlapped gathering). For whoever reads weights outside of their module's forward."""

    def hold(self, entries: Callable[[], Iterable[Held]]) -> None:
        """From now on ask `entries` before each update and leave these weights and moments bit-identical across it."""

    @property
    def content_metadata(self) -> dict[str, Any]:
        """How this engine names and cuts tensors in a checkpoint; saved beside them and handed back for loading."""

    def sharded_state_dict(
        self, *, is_loading: bool, with_optimizer: bool, content_metadata: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The state as megatron.core's dist_checkpointing describes it; tensors are this rank's own, not copies."""

    def complaint(self, saved: Mapping[str, Any]) -> str | None:
        """Why the unsharded part of a saved optimizer and schedule cannot be taken back, or None. Touches nothing."""

    def load_state_dict(self, state: Mapping[str, Any], *, with_optimizer: bool) -> None:
        """Take back what a checkpoint filled into the description."""
