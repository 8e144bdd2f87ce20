"""What the sparse attention and the sparse MLP share: a pair of linear layers cut by one choice.
 The module's own forward stays Megatron's. `choose` sets the pair for the call, `scaled` rescales what comes
out, and `entries` names the parameters of some units for whoever must hold them still.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from megatron_sat.layers.linear import SparseColumnParallelLinear, SparseRowParallelLinear
from megatron_sat.sparsity.compact import Packing
from megatron_sat.sparsity.controller import Entry
from megatron_sat.sparsity.neurons import Kept
from megatron_sat.sparsity.selector import Selector

Output = tuple[Tensor, Tensor | None]


class _SeenError(Exception):
    """A look has seen what it wanted: what comes behind need not be computed."""

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.seen = seen


def _stop_at(activations: Tensor) -> None:
    raise _SeenError(activations)


class SparsePair(Module):
    """Mixed into a Megatron module whose neurons are rows of one linear layer and columns of the next."""

    config: TransformerConfig
    _placed: tuple[Kept, Tensor, Tensor] | None = None
    """A choice, and the rows and columns it comes to."""
    _measures_alone: bool = False
    """While set: a forward ends where the choice would be made."""
    selector: Selector | None = None
    """None: the module is dense, line for line Megatron's."""

    def linear_pair(self) -> tuple[SparseColumnParallelLinear, SparseRowParallelLinear]:
        """(qkv, proj) or (fc1, fc2)."""
        raise NotImplementedError

    def choose(self, tokens: Tensor, forward: Callable[[], Output]) -> Kept | None:
        """Set the pair for this call and return what is kept (None: everything).

        tokens: [s, b, h] as the module receives them; forward: the module's own forward of them.
        """
        kept = None
        if self.selector is not None:
            if self._measures_alone:
                raise _SeenError(self.selector.measure(tokens, lambda: self._dense_activations(forward)))
            kept = self.selector.kept(tokens, lambda: self._dense_activations(forward))
        self._set(kept)
        return kept

    def scaled(self, output: Output) -> Output:
        """The module's output [s, b, h] and bias, rescaled where choice or step ask for it; the bias by the step."""
        if self.selector is None or self.selector.output_scale == 1.0:
            return output
        bias = None if output[1] is None else output[1] * self.selector.layer_scale
        return output[0] * self.selector.output_scale, bias

    def completed(self, output: Output, kept: Kept | None, forward: Callable[[], Output]) -> Output:
        """The module's output [s, b, h] and bias; with what the omitted neurons add, where they take part in forwards.

        They are cut out for each call, and keep nothing for a backward.
        """
        if kept is None or self.selector is None or self.selector.config.omit != "backward":
            return output
        column, row = self.linear_pair()
        neurons, rest = self.selector.neurons, kept.omitted()
        column.packing = row.packing = None
        column.rows, row.columns = neurons.kept_rows(rest), neurons.columns(rest)
        try:
            with torch.no_grad():
                added = forward()[0]
        finally:
            self._set(kept)
        return output[0] + added, output[1]

    def entries(self, index: Tensor) -> list[Entry]:
        """Parameter entries of the units ``index`` alone: rows of the first layer, columns of the second."""
        assert self.selector is not None
        column, row = self.linear_pair()
        rows, columns = self.selector.neurons.rows(index), self.selector.neurons.columns(index)
        found: list[Entry] = [(column.weight, 0, rows), (row.weight, 1, columns)]
        return found if column.bias is None else [*found, (column.bias, 0, rows)]

    def ready_for_replay(self) -> bool:
        """Whether the next forward launches what the last one of these shapes launched, on the same memory.

        Where the choice is known before any token is seen, its weights are packed now.
        """
        linears = self.linear_pair()
        if not all(linear.replayable for linear in linears):
            return False
        if self.selector is None or self.selector.keeps_all:
            return True
        if self.packing is None or not self.selector.settled or self.selector.config.omit != "both":
            return False
        if any(linear.pack_for(self.packing) is None for linear in linears):
            self._set(self.selector.choice)
            for linear in linears:
                linear.pack()
        return True

    @property
    def packing(self) -> Packing | None:
        """The step that the next forward's weights are packed for; None: they are not."""
        return None if self.selector is None or self.selector.keeps_all else self.selector.packing

    @property
    def units_to_keep(self) -> int:
        """In the step under way; 0 where everything stays."""
        return 0 if self.selector is None else self.selector.units_to_keep

    # -- the choice, made outside a forward of the module

    @property
    def placed(self) -> tuple[Kept, Tensor, Tensor] | None:
        """The last choice, and the rows and columns it came to."""
        return self._placed

    def can_choose_by_replay(self) -> bool:
        """Whether a choice like the last one, of as many units and packed, is asked for."""
        if self.selector is not None and self.selector.config.growing is not None:
            return False  # it goes out from the choice before it, which the recording would have as it was then
        if self.packing is None or self._placed is None or self._placed[0].count != self.units_to_keep:
            return False
        if self.selector is None or self.selector.config.omit != "both":
            return False
        return all(linear.replayable and linear.packed_buffer is not None for linear in self.linear_pair())

    def measured(self, forward: Callable[[], object]) -> Tensor:
        """The selector's sums over this rank's tokens, as ``forward`` brings them to this module and no further."""
        self._measures_alone = True
        try:
            with torch.no_grad():
                forward()
        except _SeenError as seen:
            return seen.seen
        finally:
            self._measures_alone = False
        raise AssertionError("a forward of a sparse module's layer passes through its choice")

    def place(self, kept: Kept, *, rows: Tensor, columns: Tensor, buffers: Sequence[Tensor]) -> None:
        """The step's choice, and where its part of the two weights is packed."""
        assert self.packing is not None
        column, row = self.linear_pair()
        self._placed = kept, rows, columns
        column.take_pack(self.packing, index=rows, dim=0, buffer=buffers[0])
        row.take_pack(self.packing, index=columns, dim=1, buffer=buffers[1])
        self._set(kept)

    def _set(self, kept: Kept | None) -> None:
        column, row = self.linear_pair()
        column.packing = row.packing = None if self.selector is None else self.selector.packing
        column.rows = row.columns = column.learned = row.learned = None
        if kept is None or self.selector is None:
            return
        if self._placed is None or self._placed[0] is not kept:  # once a choice, not for every micro-batch
            neurons = self.selector.neurons
            self._placed = kept, neurons.kept_rows(kept.index), neurons.columns(kept.index)
        _, rows, columns = self._placed
        if self.selector.config.omit == "weight-gradient":
            column.learned, row.learned = rows, columns
        else:
            column.rows, row.columns = rows, columns

    def _dense_activations(self, forward: Callable[[], Output]) -> Tensor:
        """[s, b, k]: the second layer's input when every neuron takes part."""
        _, row = self.linear_pair()
        self._set(None)
        row.observe = _stop_at
        try:
            with torch.no_grad(), self._without_dropout():
                forward()
        except _SeenError as seen:
            return seen.seen
        finally:
            row.observe = None
        raise AssertionError("a sparse module's forward runs its second linear layer")

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Evaluation mode for a while: had a look drawn random numbers, recomputation would draw others."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
