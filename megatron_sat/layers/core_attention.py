"""torch's scaled-dot-product attention as Megatron's core attention: flash kernels on CUDA, plain ones on a CPU.

Megatron's local core attention builds the s x s matrix and refuses context parallelism. Under CP this one gathers K and
V over the group (Megatron's own autograd gather) and lets each of the rank's two zigzag chunks look at what precedes it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


class SDPACoreAttention(MegatronModule):
    """Causal attention, grouped queries included, over as many heads as it is handed."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        """Raises ValueError for a mask type that is not causal."""
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"core attention must be causal, got {attn_mask_type}; use Megatron's own for other masks")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """query [s, b, k, d]; key, value [s, b, g', d], k a multiple of g' (s is s/cp under CP). Returns [s, b, k d].

        The mask is causal whatever attention_mask says. Raises ValueError for packed sequences, which need other kernels.
        """
        if kwargs.get("packed_seq_params") is not None:
            raise ValueError("packed sequences are not supported by SDPACoreAttention; pass packed_seq_params=None")
        size = query.shape[:2]
        if self.cp_group is None:
            out = self._attend(query, key, value)
        else:
            out = self._attend_in_chunks(query, key, value)
        return out.reshape(*size, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[q, b, k, d] queries that are the last q of the s positions of key and value. Returns [q, b, k, d]."""
        square = query.size(0) == key.size(0)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if square else causal_lower_right(q.size(2), k.size(2)),
            is_causal=square,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.size(1) != k.size(1),
        )
        return out.permute(2, 0, 1, 3)

    def _attend_in_chunks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """CP: this rank holds chunks r and 2 cp - 1 - r of 2 cp; each attends to all chunks up to itself."""
        assert self.cp_group is not None
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = (self._in_order(gather_from_sequence_parallel_region(t, group=self.cp_group)) for t in (key, value))
        first, second = query.chunk(2)
        chunk = first.size(0)
        ends = ((rank + 1) * chunk, (2 * cp - rank) * chunk)
        parts = (first, second)
        return torch.cat([self._attend(q, key[:end], value[:end]) for q, end in zip(parts, ends, strict=True)])

    def _in_order(self, gathered: Tensor) -> Tensor:
        """[s, ...] in the order of the ranks' zigzag chunks -> in the order of the sequence."""
        assert self.cp_group is not None
        cp = self.cp_group.size()
        chunks = gathered.chunk(2 * cp)  # rank r's are 2 r and 2 r + 1: sequence chunks r and 2 cp - 1 - r
        return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: attention has no parameters."""
        return {}
