"""Norm and scaling of all gradients at once, against Megatron's own, one after the other."""

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads, optimizer
from torch.testing import assert_close

from megatron_sat.engines import foreach


@pytest.fixture(autouse=True)
def megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    monkeypatch.setattr(optimizer, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in ((3, 5), (7,), (1, 1), (0,))]


def test_the_norm_is_that_of_all_tensors_as_one_vector() -> None:
    tensors = gradients()
    ours, _ = foreach.l2_norm(1, None, [tensors], False)
    theirs, _ = utils.local_multi_tensor_l2_norm(1, None, [tensors], False)
    assert ours.shape == theirs.shape == (1,)
    assert_close(ours, theirs)
    assert_close(ours.item(), torch.cat([t.flatten() for t in tensors]).double().norm().item())


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("in_place", [True, False])
def test_scaling_is_megatrons(factor: float, in_place: bool) -> None:
    ours, theirs = gradients(), gradients()
    sources = gradients()
    foreach.scale(1, None, [ours if in_place else sources, ours], factor)
    utils.local_multi_tensor_scale(1, None, [theirs if in_place else sources, theirs], factor)
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its)


def test_scaling_may_change_the_precision() -> None:
    targets = [torch.zeros(3, dtype=torch.bfloat16)]
    foreach.scale(1, None, [[torch.tensor([1.0, 2.0, 3.0])], targets], 1.0)
    assert targets[0].tolist() == [1.0, 2.0, 3.0]


def test_installed_it_clips_as_megatron_does() -> None:
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients()]
    clipped = []
    for _ in range(2):
        for parameter, gradient in zip(parameters, gradients(), strict=True):
            parameter.grad = gradient
        norm = float(clip_grads.l2_norm_impl(1, None, [[p.grad for p in parameters]], False)[0])
        clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=0.5, total_norm=norm)
        clipped.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        assert foreach.install() and foreach.install()
    assert_close(clipped[0], clipped[1])
    assert_close(clipped[1].norm(), torch.tensor(0.5))
    assert clip_grads.multi_tensor_scale_impl is optimizer.multi_tensor_scale_impl is foreach.scale


def test_apex_own_kernels_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", kernel)
    assert not foreach.install()
    assert clip_grads.l2_norm_impl is kernel
