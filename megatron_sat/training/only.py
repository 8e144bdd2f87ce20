"""Train the new rows of the vocabulary and nothing else, before the rest of the model meets them.

Before the engine is built every parameter but embedding and output layer is frozen (`freeze_all_but_vocabulary`): it
gets neither gradient buffer nor optimizer state. Within the two, `NewRows` says which rows are new. The others are held
by the engine: weights and moments stay bit-identical, whatever weight decay and momentum would do. Their gradient is
set to zero after the reduction over ranks and before its norm is taken, so that clipping sees the new rows alone.

Shapes: `v` vocabulary with padding, `p` TP size; each rank has rows [rank * v/p, (rank + 1) * v/p).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import get_model_config

from megatron_sat.engines.base import Held

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def freeze_all_but_vocabulary(chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Freeze this rank's parameters, but for input embedding and output layer. Call it before the engine is built.

    Returns the parameters that stay trainable: two, one where the head is tied or on an outer pipeline stage, or none.
    """
    kept = []
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(name.endswith(_VOCABULARY))
            if parameter.requires_grad:
                kept.append(parameter)
    return kept


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """The rows [first, last) of the whole vocabulary that are trained, as they lie on this rank."""

    parameters: Sequence[torch.nn.Parameter]
    """Embedding and output layer, as `freeze_all_but_vocabulary` returned them; each [v/p, h]."""
    first: int
    """The first new id: the number of old tokens."""
    last: int
    """One past the last new id; the rows from here on are padding and stay as they are."""
    tp_rank: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise ValueError(
                f"new rows must be a range of ids, got {self.first} to {self.last}; give the vocabulary's size "
                "before and after the extension"
            )

    def held(self) -> Iterator[Held]:
        """What no update may move, for `Engine.hold`: on each parameter the rows that are not new."""
        for parameter in self.parameters:
            yield parameter, 0, ~self.trained(parameter)

    def trained(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """bool [v/p], on the parameter's device: this rank's rows that are new."""
        rows = parameter.shape[0]
        ids = torch.arange(rows, device=parameter.device) + self.tp_rank * rows
        return (ids >= self.first) & (ids < self.last)

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Zero the gradient of every row that is held, where DDP has gathered it (main_grad)."""
        for parameter in self.parameters:
            gradient: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
            gradient.masked_fill_(~self.trained(parameter)[:, None], 0)


def train_only(rows: NewRows, *, chunks: Sequence[torch.nn.Module], hold: Callable[..., None]) -> None:
    """Confine a built engine to the new rows: hold the others, and leave them out of the gradient's norm.

    hold: the engine's `hold`. chunks: its model chunks, whose configuration names what runs between the reduction of
    gradients and the update; both engines' schedules call it.
    """
    config: Any = get_model_config(chunks[0])
    finalize = config.finalize_model_grads_func

    def finalize_and_clear(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        rows.clear_gradients()

    config.finalize_model_grads_func = finalize_and_clear
    held = list(rows.held())  # the same tensors for every update: the engine works out once where they lie
    hold(lambda: held)


def count_trained(rows: NewRows) -> int:
    """Entries that this rank trains, for the log."""
    return sum(int(rows.trained(parameter).sum()) * parameter.shape[1] for parameter in rows.parameters)


