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
    def forward(ctx: Any, weight: Tensor, index: Tensor, dim: int, values: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dim = weight.shape, dim
        return weight.index_select(dim, index) if values else shape_alone(weight, index, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (index,), (grad,) = ctx.saved_tensors, grads
        # index_copy, not index_add: kept units are distinct, and a copy needs no atomics
        return grad.new_zeros(ctx.shape).index_copy_(ctx.dim, index, grad), None, None, None


class _Learn(torch.autograd.Function):
    """weight -> weight, whole; its gradient is zero outside ``index`` along the first dimension."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,), (grad,) = ctx.saved_tensors, grads
        return torch.zeros_like(grad).index_copy_(0, index, grad.index_select(0, index)), None


def keep_rows(weight: Tensor, index: Tensor) -> Tensor:
    """[k, ...] from [n, ...]: the rows ``index`` ([k] int64, distinct). Gradient [n, ...], zero elsewhere."""
    return _Keep.apply(weight, index, 0, True)


def keep_columns(weight: Tensor, index: Tensor) -> Tensor:
    """[h, k] from [h, n]: the columns ``index`` ([k] int64, distinct). Gradient [h, n], zero elsewhere."""
    return _Keep.apply(weight, index, 1, True)


def learn_rows(weight: Tensor, index: Tensor) -> Tensor:
    """[n, ...] as it is; of its gradient the rows ``index`` ([k] int64, distinct), zero elsewhere."""
    return _Learn.apply(weight, index)


def shape_alone(weight: Tensor, index: Tensor, *, dim: int) -> Tensor:
    """[k, h] or [h, k] without memory and with no values to be read: for gradients of that shape."""
    shape = list(weight.shape)
    shape[dim] = index.numel()
    return weight.new_empty(()).expand(shape)


def keep_place(weight: Tensor, index: Tensor, *, dim: int) -> Tensor:
    """`shape_alone`; a gradient for it goes to the rows (dim 0) or columns (dim 1) ``index`` of the weight's own."""
    return _Keep.apply(weight, index, dim, False)
