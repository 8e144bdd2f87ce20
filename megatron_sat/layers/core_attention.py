"""Causal core attention over the heads that a step keeps: flash-attn where it can be used, else torch's SDPA.
 Megatron's local core attention builds the s x s matrix, insists on the dense number of heads, and refuses
context parallelism. Under CP these gather K and V over the group (Megatron's own autograd gather) and let
each of the rank's two zigzag chunks look at what precedes it.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_sat.layers.available import (
    FLASH_ATTENTION_DTYPES,
    flash_attention,
    flash_attention_varlen,
    torch_attention_varlen,
)
from megatron_sat.layers.packed import bounds_in, may_look, sequence_numbers


class SDPACoreAttention(MegatronModule):
    """Causal attention, grouped queries included, by torch's scaled-dot-product attention."""

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
        """Raises ValueError for a mask type that is not causal, a sliding window, and attention sinks."""
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(
                f"the mask of the sparse core attention must be causal, got {attn_mask_type}; "
                "use Megatron's own core attention for other masks"
            )
        if config.window_size is not None or config.softmax_type != "vanilla":
            raise ValueError(
                "--window-size and --softmax-type must be unset for sparse layers, got "
                f"{config.window_size} and {config.softmax_type}; every token attends to all before it"
            )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert config.kv_channels is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.varlen = torch_attention_varlen(cuda=torch.cuda.is_available())
        self.hybrid_stride: int | None = None
        """w: a token attends to the w tokens up to itself and to every w-th one before it (MST); None: to all."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """query: [s, b, k, d]; key, value: [s, b, g', d], k a multiple of g' (s is s/cp under CP).

        Returns [s, b, k d]. The mask is causal whatever attention_mask says; where it says bounds (`packed`), each of
        their sequences is attended to by itself.
        Raises ValueError for packed sequences.
        """
        if packed_seq_params is not None:
            raise ValueError(
                f"packed_seq_params must be None for {type(self).__name__}, "
                f"got {type(packed_seq_params).__name__}; feed unpacked sequences"
            )
        size = query.shape[:2]
        bounds = bounds_in(attention_mask)
        with self._random_state():
            if self.cp_group is not None:
                found = self._attend_in_chunks(query, key, value, bounds)
            elif bounds is not None and self.hybrid_stride is None and self._takes_bounds(query):
                found = self._attend_end_to_end(query, key, value, bounds[0])
            else:
                found = self._attend(query, key, value, _numbers(bounds, key))
            return found.reshape(*size, -1)

    def _random_state(self) -> AbstractContextManager[Any]:
        """Where dropout draws from: a state of this TP rank, whose heads are its own (SP has set it)."""
        own = self.dropout > 0.0 and self.training and not self.config.sequence_parallel
        return get_cuda_rng_tracker().fork() if own else nullcontext()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, numbers: Tensor | None = None) -> Tensor:
        """query: [q, b, k, d], the last q of the s positions of key and value. numbers: [b, s] of their sequences, None
        where there is one. Returns [q, b, k, d]."""
        square = query.size(0) == key.size(0) and numbers is None
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mask: Any = None
        if self.hybrid_stride is not None:
            square = False
            mask = hybrid_mask(q.size(2), k.size(2), stride=self.hybrid_stride, device=q.device)
        if numbers is not None:
            look = may_look(numbers, first=k.size(2) - q.size(2), last=k.size(2))
            mask = look if mask is None else look & mask
        if mask is not None:
            shared = q.size(1) // k.size(1)  # no kernel of torch takes both a mask and grouped queries
            k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
        elif not square:
            mask = causal_lower_right(q.size(2), k.size(2))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=square,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.size(1) != k.size(1),
        )
        return out.permute(2, 0, 1, 3)

    def _takes_bounds(self, query: Tensor) -> bool:
        """Whether a kernel for sequences of many lengths can be used; without one they are told apart by a mask."""
        dropped = self.dropout > 0.0 and self.training  # which torch's has not
        fits = query.dtype in FLASH_ATTENTION_DTYPES and query.size(-1) % 8 == 0 and query.size(-1) <= 256
        return self.varlen is not None and fits and not dropped

    def _attend_end_to_end(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        """[s, b, k, d] each, and where sequences begin in b s positions. Returns [s, b, k, d]."""
        length, batch = query.shape[:2]
        q, k, v = (t.transpose(0, 1).reshape(batch * length, *t.shape[2:]) for t in (query, key, value))
        out = self._by_starts(q, k, v, starts=starts, longest=length)
        return out.view(batch, length, *query.shape[2:]).transpose(0, 1)

    def _by_starts(self, q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor, longest: int) -> Tensor:
        assert self.varlen is not None
        grouped = q.size(1) != k.size(1)
        window, scale = (-1, 0), self.scale
        found: Tensor = self.varlen(
            q, k, v, starts, starts, longest, longest, scale=scale, window_size=window, enable_gqa=grouped
        )
        return found

    def _attend_in_chunks(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None) -> Tensor:
        """CP: this rank holds chunks r and 2 cp - 1 - r of 2 cp; each attends to all chunks up to itself."""
        assert self.cp_group is not None
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = (
            self._in_order(gather_from_sequence_parallel_region(t, group=self.cp_group)) for t in (key, value)
        )
        numbers = _numbers(bounds, key)
        chunk = query.size(0) // 2
        ends = ((rank + 1) * chunk, (2 * cp - rank) * chunk)
        parts = zip(query.chunk(2), ends, strict=True)
        return torch.cat(
            [
                self._attend(part, key[:end], value[:end], None if numbers is None else numbers[:, :end])
                for part, end in parts
            ]
        )

    def _in_order(self, gathered: Tensor) -> Tensor:
        """[s, ...] in the order of the ranks' zigzag chunks -> in the order of the sequence."""
        assert self.cp_group is not None
        chunks = gathered.chunk(2 * self.cp_group.size())
        # rank r's are 2 r and 2 r + 1: sequence chunks r and 2 cp - 1 - r
        return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: attention has no parameters."""
        return {}


class FlashCoreAttention(SDPACoreAttention):
    """The same by the flash-attn library for fp16 and bf16; other types go to torch."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError where flash-attn cannot be imported."""
        super().__init__(config, *args, **kwargs)
        self.flash, self.varlen = flash_attention(cuda=True), flash_attention_varlen(cuda=True)
        if self.flash is None:
            raise ValueError(
                "flash-attn must be installed (2.1 or newer) for FlashCoreAttention, it cannot be imported; "
                "pip install flash-attn, or use SDPACoreAttention"
            )

    def _takes_bounds(self, query: Tensor) -> bool:
        return self.varlen is not None and query.dtype in FLASH_ATTENTION_DTYPES

    def _by_starts(self, q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor, longest: int) -> Tensor:
        assert self.varlen is not None
        found: Tensor = self.varlen(
            q,
            k,
            v,
            starts,
            starts,
            longest,
            longest,
            dropout_p=self.dropout if self.training else 0.0,
            softmax_scale=self.scale,
            causal=True,
        )
        return found

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, numbers: Tensor | None = None) -> Tensor:
        if query.dtype not in FLASH_ATTENTION_DTYPES or numbers is not None or self.hybrid_stride is not None:
            return super()._attend(query, key, value, numbers)
        assert self.flash is not None
        out: Tensor = self.flash(
            *(t.transpose(0, 1) for t in (query, key, value)),
            dropout_p=self.dropout if self.training else 0.0,
            softmax_scale=self.scale,
            causal=True,
        )
        return out.transpose(0, 1)


def _numbers(bounds: Tensor | None, key: Tensor) -> Tensor | None:
    """[b, s] of which sequence each position of ``key`` [s, b, g', d] is; None where there is one."""
    return None if bounds is None else sequence_numbers(bounds, size=(key.size(1), key.size(0)))


def hybrid_mask(queries: int, keys: int, *, stride: int, device: torch.device) -> Tensor:
    """Bool [queries, keys], the queries the last of the keys' positions: MST's local ∪ strided attention."""
    behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (behind >= 0) & ((behind < stride) | (behind % stride == 0))


def core_attention(*, cuda: bool) -> type[SDPACoreAttention]:
    """The class for a layer specification: flash-attn's where it can be imported and a GPU is there."""
    return SDPACoreAttention if flash_attention(cuda=cuda) is None else FlashCoreAttention
