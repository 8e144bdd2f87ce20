"""RMSNorm that works under sequence parallelism; Megatron's own local one refuses it.

Under SP each TP rank normalises its part of the sequence, so the weight's gradient is a partial sum. The mark on the
weight is all that ``finalize_model_grads`` needs to add it over TP.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """[..., hidden_size] -> the same shape; statistics in fp32 whatever the input is."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Further arguments (persist_layer_norm, name, ...) belong to other implementations and have no meaning here."""
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
