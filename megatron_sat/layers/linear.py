"""Megatron's column- and row-parallel linear layers, cut to some rows or columns for the call in progress;
or whole, and only the weight's gradient of some rows or columns.
 Only `_forward_impl` is overridden, where Megatron has the weight in hand: its communication, autograd
functions and checkpoints stay its own, and so does the code on a step that keeps everything. The owner
(attention, MLP) sets `rows` or `columns` before each call; parameters keep their dense shape, and so do their
gradients, with exact zeros.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import linear_with_frozen_weight
from torch import Tensor

from megatron_sat.layers.weight_gradient import with_weight_gradient
from megatron_sat.sparsity.compact import Pack, Packing
from megatron_sat.sparsity.gather import keep_columns, keep_place, keep_rows, learn_rows


class _Cutting:
    """How both kinds of layer come by the kept part of their weight: packed once a step, or gathered each time."""

    weight: Any
    learned: Tensor | None = None
    """[k] int64, rows or columns of this rank's weight whose gradient alone the next call takes; the rest is whole."""
    packing: Packing | None = None
    """The step under way, where it packs; None: gather."""
    lent: Tensor | None = None
    """While a recording computes: the packed weight to compute with."""
    _pack: tuple[Packing, Pack] | None = None

    def _cut(self, weight: Any, *, index: Tensor, dim: int, kwargs: dict[str, Any]) -> Tensor:
        """The weight's kept rows (dim 0) or columns (dim 1). kwargs: Megatron's, told how gradients add up."""
        if self.lent is not None:
            return self.lent
        if not self._packs(weight, kwargs):
            # the fused product adds into the whole weight's main_grad; a gathered weight has none
            kwargs["gradient_accumulation_fusion"] = False
            return keep_rows(weight, index) if dim == 0 else keep_columns(weight, index)
        return self._packed(weight, index=index, dim=dim).use()

    def _packs(self, weight: Any, kwargs: Mapping[str, Any]) -> bool:
        return self.packing is not None and kwargs["gradient_accumulation_fusion"] and hasattr(weight, "main_grad")

    def _packed(self, weight: Any, *, index: Tensor, dim: int, values: bool = True) -> Pack:
        """The step's pack, made now if it is not yet."""
        assert self.packing is not None
        pack = self.pack_for(self.packing)
        if pack is None:
            buffer = None if self._pack is None else self._pack[1].buffer
            pack = Pack(weight, index, dim=dim, uses=self.packing.uses, buffer=buffer, values=values)
            self._pack = self.packing, pack
        return pack

    def _learns(self, weight: Any) -> bool:
        """Whether this call's weight gradient is of `learned` alone."""
        return self.learned is not None and weight.requires_grad and torch.is_grad_enabled()

    def _learning(self, inputs: Tensor, weight: Any, *, dim: int, kwargs: Mapping[str, Any]) -> Tensor:
        """Megatron's product with the whole weight, and the weight gradient of `learned`."""
        assert self.learned is not None
        fused = self._packs(weight, kwargs)
        if fused:
            part = self._packed(weight, index=self.learned, dim=dim, values=False).use()
        else:
            part = keep_place(weight, self.learned, dim=dim)
        # the buffer and its limit are of the embedding's gradient
        there = {**kwargs, "bias": None, "grad_output_buffer": None, "wgrad_deferral_limit": None}
        output = linear_with_frozen_weight(inputs, weight, **there)
        group = kwargs["tp_group"] if kwargs["sequence_parallel"] else None
        output = with_weight_gradient(
            output, part, inputs, index=self.learned, dim=dim, fused=fused, gathered_over=group
        )
        bias = kwargs["bias"]
        return output if bias is None else output + learn_rows(bias, self.learned)

    # -- for recordings, which find the packed weight where it was

    @property
    def packed_buffer(self) -> Tensor | None:
        """Where the kept part was packed last; None: nowhere yet."""
        return None if self._pack is None else self._pack[1].buffer

    def take_pack(self, packing: Packing, *, index: Tensor, dim: int, buffer: Tensor) -> None:
        """For the step ``packing`` the kept part lies in ``buffer``."""
        self._pack = packing, Pack(self.weight, index, dim=dim, uses=packing.uses, buffer=buffer, packed=True)

    @property
    def replayable(self) -> bool:
        """Whether gradients are added up where they lie, and nothing depends on which neurons are kept."""
        return self.gradient_accumulation_fusion and self.bias is None and hasattr(self.weight, "main_grad")  # type: ignore[attr-defined]

    def pack_for(self, packing: Packing | None) -> Pack | None:
        """The weight as packed for that step; None: not packed, or not yet."""
        return self._pack[1] if self._pack is not None and packing is not None and self._pack[0] is packing else None

    def packed_leaf(self, packing: Packing | None) -> Tensor | None:
        """The packed weight as a leaf, for a recording to compute with; None: the whole weight."""
        pack = self.pack_for(packing)
        return None if pack is None else pack.leaf()

    def gradient_added(self, packing: Packing | None) -> None:
        """A replay has added this use's gradient."""
        pack = self.pack_for(packing)
        if pack is not None:
            pack.used(self.weight)
        self.weight.grad_added_to_main_grad = True


class SparseColumnParallelLinear(_Cutting, ColumnParallelLinear):
    """[s, b, h] -> [s, b, k]: the output neurons `rows` of this rank's shard; all where it is None."""

    rows: Tensor | None = None
    """[k] int64, the rows of this rank's weight that the next call computes."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; a bias that is handed back (skip_bias_add) is cut like the output."""
        output, bias = super().forward(input_, *args, **kwargs)
        if bias is not None and self.rows is not None:
            bias = keep_rows(bias, self.rows)
        elif bias is not None and self.learned is not None:
            bias = learn_rows(bias, self.learned)
        return output, bias

    def pack(self) -> None:
        """Pack `rows` for the step under way."""
        if self.rows is not None:
            self._packed(self.weight, index=self.rows, dim=0)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._learns(weight):
            return self._learning(input, weight, dim=0, kwargs=kwargs)
        if self.rows is not None:
            weight = self._cut(weight, index=self.rows, dim=0, kwargs=kwargs)
            if kwargs.get("bias") is not None:
                kwargs["bias"] = keep_rows(kwargs["bias"], self.rows)
        return super()._forward_impl(input, weight, *args, **kwargs)


class SparseRowParallelLinear(_Cutting, RowParallelLinear):
    """[s, b, k] -> [s, b, h]: from the input neurons `columns` of this rank's shard; all where it is None."""

    columns: Tensor | None = None
    """[k] int64, the columns of this rank's weight that the next call's input belongs to."""
    observe: Callable[[Tensor], None] | None = None
    """While set: is shown each call's input, the activations of the module's neurons."""

    def pack(self) -> None:
        """Pack `columns` for the step under way."""
        if self.columns is not None:
            self._packed(self.weight, index=self.columns, dim=1)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.observe is not None:
            self.observe(input)
        if self._learns(weight):
            return self._learning(input, weight, dim=1, kwargs=kwargs)
        if self.columns is not None:
            weight = self._cut(weight, index=self.columns, dim=1, kwargs=kwargs)
        return super()._forward_impl(input, weight, *args, **kwargs)
