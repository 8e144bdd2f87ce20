"""Weight gradients added in the matrix product, by torch instead of apex.

Megatron's linear layers can add a weight gradient into the fp32 main gradient as part of the product that computes it
(``gradient_accumulation_fusion``), which saves writing the gradient, reading it again and adding it. The kernel they
call comes with apex; where apex is not installed, `install` puts `torch.addmm` in its place, which does the same.
"""

from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def add_weight_gradient(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [k, h] += grad_outputᵀ [k, t] · inputs [t, h], in main_grad's precision. In place."""
    if main_grad.dtype == inputs.dtype:
        torch.addmm(main_grad, grad_output.t(), inputs, out=main_grad)
    elif inputs.is_cuda and _MIXED:
        torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.add_(grad_output.t().matmul(inputs))


def install() -> bool:
    """Let Megatron's layers fuse gradient accumulation without apex. Returns whether ours is in force."""
    if getattr(layers, "fused_weight_gradient_mlp_cuda", None) is None:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
        )
        layers._grad_accum_fusion_available = True
    return layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32 is add_weight_gradient


def _supports_mixed() -> bool:
    """Whether torch.addmm takes 16-bit factors and a 32-bit sum (torch 2.8 and newer)."""
    return any("out_dtype" in str(schema) for schema in torch._C._jit_get_schemas_for_operator("aten::addmm"))


_MIXED = _supports_mixed()
