"""Cutting a weight to its kept rows or columns, with a gradient that has the weight's own shape.

The slow path that every faster one is tested against: the kept part is copied out for each use, and the
gradient comes back in the dense shape, with exact zeros for what was omitted. So parameters, gradient
buffers, optimizer and checkpoints never meet sparsity.
"""

from typing import Any

import torch
from torch import Tensor


class _Keep(torch.autograd.Function):
    """weight -> weight cut to ``index`` along ``dim``; the gradient is spread back into zeros."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dim = weight.shape, dim
        return weight.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index,), (grad,) = ctx.saved_tensors, grads
        # index_copy, not index_add: kept units are distinct, and a copy needs no atomics
        return grad.new_zeros(ctx.shape).index_copy_(ctx.dim, index, grad), None, None


def keep_rows(weight: Tensor, index: Tensor) -> Tensor:
    """[k, ...] from [n, ...]: the rows ``index`` ([k] int64, distinct). Gradient [n, ...], zero elsewhere."""
    return _Keep.apply(weight, index, 0)


def keep_columns(weight: Tensor, index: Tensor) -> Tensor:
    """[h, k] from [h, n]: the columns ``index`` ([k] int64, distinct). Gradient [h, n], zero elsewhere."""
    return _Keep.apply(weight, index, 1)
