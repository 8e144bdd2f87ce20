"""SPDF against an optimizer written out that never touches what is left out."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter, Sequential
from torch.testing import assert_close

from megatron_sat.baselines.spdf import Spdf, flops_share, magnitude_mask
from tests.helpers.tolerances import EXACT, FP32_SUMS

LEARNING_RATE, DECAY, BETAS, TINY = 1e-2, 0.1, (0.9, 0.95), 1e-8
STEPS, UNTIL = 6, 4


def make_model() -> Module:
    torch.manual_seed(0)
    return Sequential(Linear(5, 8), torch.nn.Tanh(), Linear(8, 3))


def matrices(model: Module) -> list[Parameter]:
    return [parameter for parameter in model.parameters() if parameter.dim() == 2]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator)


def loss_of(model: Module, step: int) -> Tensor:
    inputs, targets = batch(step)
    return (model(inputs) - targets).square().mean()


def train(model: Module, *, until: int | None, clip: float) -> list[float]:
    """AdamW with SPDF (None: without), gradients clipped; the norms before clipping."""
    spdf = None if until is None else Spdf(matrices(model), until=until)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY, betas=BETAS, eps=TINY)
    norms = []
    for step in range(1, STEPS + 1):
        if spdf is not None:
            spdf.begin_step(step)
        loss_of(model, step).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def literal_mask(weight: Tensor, *, keep: int) -> list[bool]:
    """The ``keep`` entries of largest magnitude, the earlier one of equals."""
    flat = weight.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda place: (-abs(flat[place]), place))
    return [place in order[:keep] for place in range(len(flat))]


def written_out(*, until: int, clip: float) -> Module:
    """AdamW entry by entry, over those that take part; the others are zero until they do, and start from nothing."""
    model = make_model()
    masks: dict[int, list[bool]] = {}
    for parameter in model.parameters():
        size = parameter.numel()
        kept = literal_mask(parameter.detach(), keep=size - size // 2) if parameter.dim() == 2 else [True] * size
        masks[id(parameter)] = kept
        parameter.data.view(-1)[[place for place in range(size) if not kept[place]]] = 0
    moments = {id(parameter): [[0.0, 0.0] for _ in range(parameter.numel())] for parameter in model.parameters()}
    for step in range(1, STEPS + 1):
        model.zero_grad()
        loss_of(model, step).backward()

        def taking_part(parameter: Parameter, step: int = step) -> list[int]:
            return [p for p in range(parameter.numel()) if step > until or masks[id(parameter)][p]]

        gradients: dict[int, Any] = {id(p): p.grad.view(-1) for p in model.parameters()}
        squares = sum(gradients[id(p)][place].item() ** 2 for p in model.parameters() for place in taking_part(p))
        factor = min(1.0, clip / (squares**0.5 + 1e-6))
        for parameter in model.parameters():
            for place in taking_part(parameter):
                gradient = gradients[id(parameter)][place].item() * factor
                both, value = moments[id(parameter)][place], parameter.data.view(-1)[place].item()
                both[0] = BETAS[0] * both[0] + (1 - BETAS[0]) * gradient
                both[1] = BETAS[1] * both[1] + (1 - BETAS[1]) * gradient**2
                mean, spread = both[0] / (1 - BETAS[0] ** step), both[1] / (1 - BETAS[1] ** step)
                value = value * (1 - LEARNING_RATE * DECAY) - LEARNING_RATE * mean / (spread**0.5 + TINY)
                parameter.data.view(-1)[place] = value
    return model


@pytest.mark.parametrize("until", [1, UNTIL, STEPS])
@pytest.mark.parametrize("clip", [0.3, 100.0])
def test_a_run_is_adam_on_what_takes_part(clip: float, until: int) -> None:
    model = make_model()
    train(model, until=until, clip=clip)
    assert_close(dict(model.state_dict()), dict(written_out(until=until, clip=clip).state_dict()), **FP32_SUMS)


def test_a_dense_run_is_another_one() -> None:
    """The negative control."""
    model, dense = make_model(), make_model()
    train(model, until=UNTIL, clip=0.3)
    train(dense, until=None, clip=0.3)
    assert (matrices(model)[0] - matrices(dense)[0]).abs().max() > 1e-2


def test_what_is_left_out_is_exactly_zero_until_the_step_and_learns_after_it() -> None:
    model = make_model()
    masks = [magnitude_mask(weight, rate=Fraction(1, 2)) for weight in matrices(model)]
    train(model, until=STEPS, clip=0.3)
    assert all(not weight[~mask].any() for weight, mask in zip(matrices(model), masks, strict=True))
    again = make_model()
    train(again, until=STEPS - 1, clip=0.3)
    assert all(weight[~mask].all() for weight, mask in zip(matrices(again), masks, strict=True))


def test_norms_are_of_what_takes_part() -> None:
    """The gradients are masked before they are clipped: with all of them the norm is larger."""
    sparse = make_model()
    norms = train(sparse, until=STEPS, clip=0.3)
    model = make_model()
    Spdf(matrices(model), until=1).begin_step(2)
    loss_of(model, 1).backward()
    assert norms[0] < torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)


@pytest.mark.parametrize(("rate", "kept"), [("1/2", 8), ("1/3", 10), ("0", 15), ("0.95", 1)])
def test_the_largest_stay_and_of_equals_the_earlier(rate: str, kept: int) -> None:
    weight = torch.tensor([[1.0, -3, 2, -2, 0], [3, 0, 1, -1, 4], [2, 2, 0, -4, 1]])
    mask = magnitude_mask(weight, rate=Fraction(rate))
    assert mask.flatten().tolist() == literal_mask(weight, keep=kept)


def test_what_a_run_costs_is_counted() -> None:
    assert flops_share(rate=Fraction(1, 2), until=2000, steps=3000) == Fraction(2, 3)
    assert flops_share(rate=Fraction(1, 2), until=9, steps=4) == Fraction(1, 2)
    assert flops_share(rate=Fraction(0), until=9, steps=4) == 1


def test_a_parameter_that_moves_to_another_type_keeps_its_mask() -> None:
    model = make_model()
    spdf = Spdf(matrices(model), until=STEPS)
    model.double()
    (model(batch(1)[0].double()) ** 2).sum().backward()
    for weight, mask in zip(matrices(model), spdf.masks, strict=True):
        assert weight.grad is not None
        assert_close(weight.grad[~mask], torch.zeros_like(weight.grad[~mask]), **EXACT)
        assert weight.grad[mask].any()


@pytest.mark.parametrize("rate", [Fraction(1), Fraction(-1, 2)])
def test_a_rate_that_is_none_is_an_error(rate: Fraction) -> None:
    with pytest.raises(ValueError, match=r"the rate of SPDF must be in \[0, 1\), got"):
        Spdf(matrices(make_model()), rate=rate, until=1)


@pytest.mark.parametrize("until", [0, -1])
def test_zeros_that_no_step_trains_with_are_an_error(until: int) -> None:
    """And they are an error before they are made: the weights stay as they were."""
    model = make_model()
    said = f"the last sparse step of SPDF must be at least 1, got {until}; a dense run has no SPDF"
    with pytest.raises(ValueError, match=said):
        Spdf(matrices(model), until=until)
    assert all(weight.all() for weight in matrices(model))


def test_weights_in_shards_are_an_error() -> None:
    weights = matrices(make_model())
    weights[1].ds_shape = weights[1].shape  # type: ignore[attr-defined]  # as ZeRO-3 marks them
    with pytest.raises(ValueError, match="SPDF masks need whole weights, ZeRO-3 has left them in shards; use ZeRO-2"):
        Spdf(weights, until=1)
