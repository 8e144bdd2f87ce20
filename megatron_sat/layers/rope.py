"""Rotary position embedding in one kernel each way, where Megatron's fusion (Transformer Engine's, apex') is absent.

Megatron's unfused form is nine kernels forward, takes the cosine and sine of the same angles in every layer, and lets
autograd keep the parts. A rotation's gradient is the rotation by the negative angle, so nothing is kept but two tables.

Shapes: `s` sequence, `b` micro-batch, `n` heads, `d` head dimension, `r` rotated part of it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

_TABLES = "_cosine_and_sine"


def install() -> None:
    """Let Megatron's attention rotate through `rotate`. Its interleaving for latent attention stays its own."""
    true = rope_utils._apply_rotary_pos_emb_bshd
    if true is rotate:
        return
    rotate.unfused = true  # type: ignore[attr-defined]
    rope_utils._apply_rotary_pos_emb_bshd = rotate


def rotate(t: Tensor, freqs: Tensor, rotary_interleaved: bool = False, *more: Any, **named: Any) -> Tensor:
    """Megatron's `_apply_rotary_pos_emb_bshd`. t: [s, b, n, d]; freqs: [s, 1, 1, r], angles. Returns [s, b, n, d]."""
    mscale = named.get("mscale", 1.0)
    if more or rotary_interleaved or any(value for name, value in named.items() if name != "mscale"):
        unfused: Callable[..., Tensor] = rotate.unfused  # type: ignore[attr-defined]
        return unfused(t, freqs, rotary_interleaved, *more, **named)
    cosine, sine = _tables(freqs, mscale=mscale, dtype=t.dtype)
    rotated: Tensor = _Rotation.apply(t, cosine, sine)
    return rotated


def _tables(freqs: Tensor, *, mscale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[s, 1, 1, r] each; kept with the angles, which Megatron computes once for a length."""
    kept: dict[Any, tuple[Tensor, Tensor]] = freqs.__dict__.setdefault(_TABLES, {})
    if (mscale, dtype) not in kept:
        kept[mscale, dtype] = (torch.cos(freqs) * mscale).to(dtype), (torch.sin(freqs) * mscale).to(dtype)
    return kept[mscale, dtype]


class _Rotation(torch.autograd.Function):
    """t -> t cos + (t turned by a quarter) sin."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return (_compiled() if t.is_cuda else _turned)(t, cosine, sine, forward=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return (_compiled() if grads[0].is_cuda else _turned)(grads[0], cosine, sine, forward=False), None, None


def _turned(t: Tensor, cosine: Tensor, sine: Tensor, *, forward: bool) -> Tensor:
    rotated, rest = t[..., : cosine.size(-1)], t[..., cosine.size(-1) :]
    first, second = rotated.chunk(2, dim=-1)
    quarter = torch.cat((-second, first), dim=-1) * sine
    turned = rotated * cosine + quarter if forward else rotated * cosine - quarter
    return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned


@cache
def _compiled() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(_turned)
    return compiled
