"""Norm and scaling of all gradients by torch's multi-tensor kernels, where apex and Transformer Engine are absent.

Megatron's fallback takes the norm of one gradient after the other, waits for each on the host, and scales through a
copy: 8 ms a billion parameters on an H100, most of which these two do without.
"""

from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads, optimizer
from torch import Tensor


def l2_norm(
    chunk_size: int, noop_flag: Any, tensors: list[list[Tensor]], per_tensor: bool, *_: Any
) -> tuple[Tensor, None]:
    """The norm of all tensors as one vector, [1] fp32 on their device. As amp_C.multi_tensor_l2norm; no overflow."""
    norms = torch._foreach_norm([tensor for group in tensors for tensor in group], 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None


def scale(chunk_size: int, noop_flag: Any, tensors: list[list[Tensor]], factor: float) -> None:
    """targets = sources * factor, one after the other in two lists that may be the same."""
    sources, targets = tensors
    if any(source is not target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_copy_(targets, sources)
    if factor != 1.0:
        torch._foreach_mul_(targets, factor)


def install() -> bool:
    """Put the two in the place of Megatron's fallbacks. Returns whether ours are in force."""
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
        clip_grads.multi_tensor_scale_impl = optimizer.multi_tensor_scale_impl = scale
    return clip_grads.l2_norm_impl is l2_norm
