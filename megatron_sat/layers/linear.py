"""Megatron's column- and row-parallel linear layers, cut to some rows or columns for the call in progress.
 Only `_forward_impl` is overridden, where Megatron has the weight in hand: its communication, autograd
functions and checkpoints stay its own, and so does the code on a step that keeps everything. The owner
(attention, MLP) sets `rows` or `columns` before each call; parameters keep their dense shape, and so do their
gradients, with exact zeros.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_sat.sparsity.compact import Pack, Packing
from megatron_sat.sparsity.gather import keep_columns, keep_rows


class _Cutting:
    """How both kinds of layer come by the kept part of their weight: packed once a step, or gathered each time."""

    packing: Packing | None = None
    """The step under way, where it packs; None: gather."""
    _pack: tuple[Packing, Pack] | None = None

    def _cut(self, weight: Any, *, index: Tensor, dim: int, kwargs: dict[str, Any]) -> Tensor:
        """The weight's kept rows (dim 0) or columns (dim 1). kwargs: Megatron's, told how gradients add up."""
        if self.packing is None or not kwargs["gradient_accumulation_fusion"] or not hasattr(weight, "main_grad"):
            # the fused product adds into the whole weight's main_grad; a gathered weight has none
            kwargs["gradient_accumulation_fusion"] = False
            return keep_rows(weight, index) if dim == 0 else keep_columns(weight, index)
        if self._pack is None or self._pack[0] is not self.packing:
            self._pack = self.packing, Pack(weight, index, dim=dim, uses=self.packing.uses)
        return self._pack[1].use()


class SparseColumnParallelLinear(_Cutting, ColumnParallelLinear):
    """[s, b, h] -> [s, b, k]: the output neurons `rows` of this rank's shard; all where it is None."""

    rows: Tensor | None = None
    """[k] int64, the rows of this rank's weight that the next call computes."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; a bias that is handed back (skip_bias_add) is cut like the output."""
        output, bias = super().forward(input_, *args, **kwargs)
        return output, bias if bias is None or self.rows is None else keep_rows(bias, self.rows)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.observe is not None:
            self.observe(input)
        if self.columns is not None:
            weight = self._cut(weight, index=self.columns, dim=1, kwargs=kwargs)
        return super()._forward_impl(input, weight, *args, **kwargs)
