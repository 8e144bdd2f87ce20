"""SpIEL's Adam against torch's, where ages do not differ; what ages do is written out in test_spiel."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.testing import assert_close

from megatron_sat.baselines.spiel_adam import SpielAdamW
from tests.helpers.tolerances import EXACT, FP32_SUMS


def gradient(step: int) -> Tensor:
    return torch.randn(9, generator=torch.Generator().manual_seed(step))


def test_with_ages_alike_and_epsilon_of_nothing_it_is_adamw_whose_decay_comes_last() -> None:
    ours, torchs = (Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    mine = SpielAdamW([ours], lr=1e-2, weight_decay=2.0, eps=0.0)
    theirs = torch.optim.AdamW([torchs], lr=1e-2, weight_decay=0.0, betas=(0.9, 0.999), eps=0.0)
    for step in range(1, 8):
        ours.grad, torchs.grad = gradient(step), gradient(step)
        mine.step()
        theirs.step()
        with torch.no_grad():
            torchs *= 1 - 1e-2 * 2.0
        assert_close(ours, torchs, **FP32_SUMS)


def test_what_is_planted_goes_on_as_in_a_parameter_of_its_own() -> None:
    """At age a with m and v, beside entries that are older."""
    mixed, young = Parameter(torch.zeros(9)), Parameter(torch.zeros(3))
    both = SpielAdamW([mixed, young], lr=1e-2, weight_decay=1.0)
    for step in range(1, 4):
        mixed.grad = gradient(step)
        both.step()
    where, mean, square = torch.tensor([1, 4, 8]), gradient(50)[:3], gradient(51)[:3].square()
    with torch.no_grad():
        mixed[where] = 0
    both.plant(mixed, where=where, mean=mean, square=square, age=5)
    both.plant(young, where=torch.arange(3), mean=mean, square=square, age=5)
    for step in range(60, 64):
        mixed.grad, young.grad = gradient(step), gradient(step)[where]
        both.step()
    assert_close(mixed.detach()[where], young.detach(), **EXACT)


def test_what_has_no_gradient_stays() -> None:
    parameter = Parameter(torch.ones(3))
    SpielAdamW([parameter], lr=1.0, weight_decay=0.5).step()
    assert_close(parameter.detach(), torch.ones(3), **EXACT)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_closure_is_evaluated_with_gradients(decay: float) -> None:
    parameter = Parameter(torch.ones(3))
    optimizer = SpielAdamW([parameter], lr=1e-2, weight_decay=decay)

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert_close(parameter.detach(), torch.full((3,), 0.99 * (1 - 1e-2 * decay)), **FP32_SUMS)
