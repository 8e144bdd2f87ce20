"""The selection noise of one module drawn by itself: the plain twin of `megatron_sat.sparsity.noise`."""

import torch
from torch import Tensor

from megatron_sat.sparsity.selection import gumbel, uniform_draw


def gumbel_noise(
    total: int, *, seed: int, step: int, layer: int, kind: str, device: torch.device | None = None
) -> Tensor:
    """[total] fp32 standard Gumbel variates on ``device``: the noise of one module in one step."""
    return gumbel(uniform_draw(total, seed=seed, step=step, layer=layer, kind=kind), device=device)
