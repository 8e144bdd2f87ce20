"""A step's choice in one module, recorded: norm, sums, scores, sampling and packing without the host's help.

Chosen eagerly it costs the host 0.8 ms a module, in which the device waits (H100). The first recording ends with the
sums over this rank's tokens, where other ranks add theirs; the second goes from there to packed weights. Whatever must
be there after the step's other replays lies outside the recordings' memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_sat.layers.recording import Recorder, fill
from megatron_sat.layers.sparse import SparsePair


class RecordedChoice:
    """Makes the choice of the step under way, for one module, one shape and one number of units to keep."""

    def __init__(
        self,
        pair: SparsePair,
        hidden: Tensor,
        *,
        forward: Callable[..., Any],
        bound: Mapping[str, Any],
        recorder: Recorder,
        place: int,
    ) -> None:
        """forward: of hidden states and what is bound by name, through the module. The last step's packed weights must
        still be there: this one's take their place. Nothing is chosen yet.
        """
        assert pair.selector is not None and pair.placed is not None
        self._pair, self._selector = pair, pair.selector
        last, rows, columns = pair.placed
        device = last.index.device
        self._index, self._rows, self._columns = last.index.clone(), rows.clone(), columns.clone()
        self._noise = torch.empty(last.units, device=device) if self._selector.samples else None
        self._sums = torch.empty(self._selector.sums_width, device=device)
        self._buffers = [linear.packed_buffer for linear in pair.linear_pair() if linear.packed_buffer is not None]
        self._inputs, self.bound, self._forward = hidden.detach(), bound, forward
        self._measure = recorder.record_launch(self._launch_sums, place=place)
        self._pick = recorder.record_launch(self._launch_choice, place=place)

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> None:
        """Choose and pack, or measure for the next step, whatever the step asks for."""
        fill(self._inputs, hidden)
        self._measure()
        self._selector.settle(self._selector.add(self._sums).clone(), pick=self._picked)
        choice = self._selector.choice
        if choice is not None and choice.index is self._index:
            self._pair.place(choice, rows=self._rows, columns=self._columns, buffers=self._buffers)

    def _picked(self, sums: Tensor, noise: Tensor | None) -> Tensor:
        self._sums.copy_(sums)
        if self._noise is not None and noise is not None:
            self._noise.copy_(noise)
        self._pick()
        return self._index

    @torch.no_grad()
    def _launch_sums(self) -> None:
        # nothing that stays may hold this object: with it a rung's packed weights would stay until garbage is collected
        self._sums.copy_(self._pair.measured(lambda: self._forward(self._inputs, **self.bound)))

    @torch.no_grad()
    def _launch_choice(self) -> None:
        neurons = self._selector.neurons
        self._index.copy_(self._selector.pick(self._sums, self._noise))
        self._rows.copy_(neurons.kept_rows(self._index))
        self._columns.copy_(neurons.columns(self._index))
        column, row = self._pair.linear_pair()
        torch.index_select(column.weight.detach(), 0, self._rows, out=self._buffers[0])
        torch.index_select(row.weight.detach(), 1, self._columns, out=self._buffers[1])
