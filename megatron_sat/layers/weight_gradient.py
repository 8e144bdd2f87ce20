"""The weight gradient of some rows or columns, taken beside a product that knows of none.

`with_weight_gradient` stands behind a linear layer that computes with its whole weight, and whose own backward gives
the gradient of its inputs alone (Megatron's for frozen weights). The product that is saved is a third of a linear
layer's; the inputs of a row-parallel layer are kept for the backward at the chosen columns only.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, layers
from torch import Tensor
from torch.distributed import ProcessGroup


def with_weight_gradient(
    output: Tensor,
    part: Tensor,
    inputs: Tensor,
    *,
    index: Tensor,
    dim: int,
    fused: bool,
    gathered_over: ProcessGroup | None,
) -> Tensor:
    """``output`` [s, b, n] of ``inputs`` [s, b, h], as it is; its backward gives ``part`` a gradient.

    part: [k, h], for the rows ``index`` (dim 0), or [n, k], for the columns (dim 1); its values are not read. fused:
    its ``main_grad`` gets the gradient, in that precision, as Megatron's linear layers do it, and what flows on only
    says so. gathered_over: the ranks that hold other tokens of the inputs ([s/p, b, h], sequence parallelism); the
    backward gathers them again, as Megatron's does.
    """
    sums = part.main_grad if fused else None  # type: ignore[attr-defined]
    return _Take.apply(output, part, inputs.detach(), index, dim, sums, gathered_over)


class _Take(torch.autograd.Function):
    """(output, part of the weight) -> output."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        part: Tensor,
        inputs: Tensor,
        index: Tensor,
        dim: int,
        sums: Tensor | None,
        group: ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs if dim == 0 else inputs.index_select(-1, index), index)
        ctx.dim, ctx.sums, ctx.group, ctx.shape = dim, sums, group, part.shape
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs, index = ctx.saved_tensors
        if ctx.group is not None:
            inputs = gather_from_sequence_parallel_region(inputs, group=ctx.group)
        of_neurons = grads[0].index_select(-1, index) if ctx.dim == 0 else grads[0]
        found = _product(inputs.flatten(0, -2), of_neurons.flatten(0, -2).contiguous(), sums=ctx.sums)
        return grads[0], found.expand(ctx.shape), None, None, None, None, None


def _product(inputs: Tensor, grads: Tensor, *, sums: Tensor | None) -> Tensor:
    """gradsᵀ [k, t] · inputs [t, h]; where there are ``sums`` it is added to them, and a number that says nothing
    comes back."""
    if sums is None:
        return grads.t().matmul(inputs)
    kernels = layers.fused_weight_gradient_mlp_cuda
    add = kernels.wgrad_gemm_accum_fp32 if sums.dtype == torch.float32 else kernels.wgrad_gemm_accum_fp16
    add(inputs.contiguous(), grads, sums)
    return inputs.new_zeros(())
