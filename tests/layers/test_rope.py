"""Rotary embedding with tables that are kept, against Megatron's unfused form, forward and backward."""

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from torch.testing import assert_close

from megatron_sat.layers import rope


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    unfused = getattr(rope.rotate, "unfused", rope_utils._apply_rotary_pos_emb_bshd)
    monkeypatch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", unfused)
    monkeypatch.setattr(rope.rotate, "unfused", None, raising=False)
    rope.install()
    rope.install()


def angles(length: int, rotated: int) -> torch.Tensor:
    inverse = 1.0 / 10000 ** (torch.arange(0, rotated, 2) / rotated)
    halves = torch.outer(torch.arange(length).float(), inverse)
    return torch.cat([halves, halves], dim=-1)[:, None, None, :]


@pytest.mark.parametrize("rotated", [16, 8], ids=["whole head", "half of it"])
@pytest.mark.parametrize("mscale", [1.0, 1.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_megatrons(rotated: int, mscale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    t = torch.randn(12, 2, 4, 16, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(12, 2, 4, 16, generator=generator).to(dtype)
    freqs = angles(12, rotated)
    found = []
    for function in (rope_utils._apply_rotary_pos_emb_bshd, rope.rotate.unfused):
        out = function(t, freqs, rotary_interleaved=False, mscale=mscale)
        found += [out, *torch.autograd.grad(out, t, weights)]
    ours, our_grad, theirs, their_grad = found
    assert rope_utils._apply_rotary_pos_emb_bshd is rope.rotate
    assert_close(ours, theirs, atol=0, rtol=0)
    assert_close(our_grad, their_grad, atol=0 if dtype == torch.float32 else 2e-2, rtol=0)


def test_what_it_cannot_rotate_goes_to_megatron() -> None:
    t, freqs = torch.randn(6, 1, 2, 8), angles(6, 8)
    name = "mla_rotary_interleaved" if "mla_rotary_interleaved" in _arguments() else "multi_latent_attention"
    for named in ({"rotary_interleaved": True}, {name: True}):
        assert torch.equal(rope.rotate(t, freqs, **named), rope.rotate.unfused(t, freqs, **named))
    assert not torch.equal(rope.rotate(t, freqs), rope.rotate(t, freqs, rotary_interleaved=True))


def _arguments() -> set[str]:
    return set(rope.rotate.unfused.__code__.co_varnames)


def test_the_tables_are_made_once_for_the_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    true = torch.cos
    monkeypatch.setattr(torch, "cos", lambda x: (made.append(x), true(x))[1])
    freqs = angles(6, 8)
    for _ in range(3):
        rope.rotate(torch.randn(6, 1, 2, 8), freqs)
    assert len(made) == 1
    rope.rotate(torch.randn(6, 1, 2, 8, dtype=torch.bfloat16), freqs)
    assert len(made) == 2
