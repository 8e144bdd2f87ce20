"""GELU in its tanh form, as GPT-2 has it, for where Megatron's fused kernel does not compute it.

Megatron-LM has both forms: the kernel that adds a bias and applies GELU at once (``--bias-gelu-fusion``) computes this
one, all else the exact one with erf. They differ by 5e-4 at most.
"""

import torch.nn.functional as F
from torch import Tensor


def tanh_gelu(x: Tensor) -> Tensor:
    """x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), of any shape: Hendrycks and Gimpel 2016, section 2."""
    return F.gelu(x, approximate="tanh")
