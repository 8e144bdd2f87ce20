"""Windows that hold several sequences and padding: who may look at whom, and which tokens count.

What says so comes to the model as its attention mask, in a form of ours, the *bounds*: i32 [2, n + 1], the windows
of a micro-batch [b, s] laid end to end. Row 0: where each of the n sequences begins, and at last b s. Row 1: 1 where
it is an example, 0 where it is padding. Any other mask means: each window is one sequence.

Rotary positions need no new beginning: a score depends on the distance of two positions alone. Learned ones get it: the
position ids of a batch begin anew with each example.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from megatron_sat.distributed import Layout
from megatron_sat.layers.sparse import SparsePair
from megatron_sat.sparsity.place import Counted


def bounds_in(attention_mask: Tensor | None) -> Tensor | None:
    """The bounds, where the mask is some."""
    return attention_mask if attention_mask is not None and attention_mask.dtype == torch.int32 else None


def sequence_numbers(bounds: Tensor, *, size: tuple[int, int]) -> Tensor:
    """[b, s] i64: which of the sequences each position belongs to. size: (b, s)."""
    positions = torch.arange(size[0] * size[1], device=bounds.device, dtype=torch.int32)
    return (torch.searchsorted(bounds[0].contiguous(), positions, right=True) - 1).view(size)


def may_look(numbers: Tensor, *, first: int, last: int) -> Tensor:
    """[b, 1, last - first, last] bool: which positions up to ``last`` those from ``first`` on attend to."""
    rows, columns = numbers[:, first:last, None], numbers[:, None, :last]
    places = torch.arange(last, device=numbers.device)
    return ((rows == columns) & (places[first:, None] >= places)).unsqueeze(1)


def counted(bounds: Tensor, *, size: tuple[int, int], layout: Layout, sequence_parallel: bool) -> Counted:
    """Which of this rank's tokens are no padding, as its modules see them. size: (b, s) of whole windows."""
    real = bounds[1].bool()[sequence_numbers(bounds, size=size)].t()  # [s, b]
    if layout.cp_size > 1:  # the two zigzag chunks
        chunks = real.chunk(2 * layout.cp_size)
        real = torch.cat([chunks[layout.cp_rank], chunks[2 * layout.cp_size - 1 - layout.cp_rank]])
    inputs = real.chunk(layout.tp_size)[layout.tp_rank] if sequence_parallel else real
    return Counted(inputs=inputs, activations=real)


def leave_padding_out(chunks: Iterable[Module], *, layout: Layout) -> None:
    """Let the selectors of these model chunks sum over what is no padding, from each forward's bounds."""
    for chunk in chunks:
        pairs = [module for module in chunk.modules() if isinstance(module, SparsePair)]
        if pairs:
            chunk.register_forward_pre_hook(_Tell(pairs, layout=layout))


class _Tell:
    """Before a chunk's forward(tokens [b, s/cp], position_ids, attention_mask, ...): tells its selectors."""

    def __init__(self, pairs: list[SparsePair], *, layout: Layout) -> None:
        self._pairs, self._layout = pairs, layout

    def __call__(self, _: Module, args: tuple[Any, ...]) -> None:
        selectors = [pair.selector for pair in self._pairs if pair.selector is not None]
        tokens, bounds = args[0], bounds_in(args[2])
        found = None
        if bounds is not None and not all(selector.settled for selector in selectors):
            size = tokens.size(0), tokens.size(1) * self._layout.cp_size
            sequence_parallel = self._pairs[0].config.sequence_parallel
            found = counted(bounds, size=size, layout=self._layout, sequence_parallel=sequence_parallel)
        for selector in selectors:
            selector.counted = found
