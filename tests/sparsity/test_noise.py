"""Noise drawn together, one step ahead, is the noise of each module drawn alone."""

import pytest
import torch

from megatron_sat.sparsity import noise as room
from megatron_sat.sparsity.noise import Noise, Part
from tests.helpers.noise import gumbel_noise

CPU = torch.device("cpu")
PARTS = [
    Part(seed=3, kind="attention", layer=1, total=8, first=0, last=8),
    Part(seed=3, kind="mlp", layer=1, total=48, first=24, last=48),  # the second of two TP ranks
    Part(seed=4, kind="mlp", layer=2, total=48, first=0, last=24),
]


def alone(part: Part, draw: int) -> torch.Tensor:
    noise = gumbel_noise(part.total, seed=part.seed, step=draw, layer=part.layer, kind=part.kind)
    return noise[part.first : part.last]


@pytest.mark.parametrize("ahead", [True, False])
def test_each_part_gets_what_it_would_draw_alone(ahead: bool) -> None:
    noise = Noise()
    takes = [noise.join(part) for part in PARTS]
    for draw in (5, 5, 6, 9, 2):  # twice in a selection interval, onwards, after a jump, back
        noise.following = draw + 1 if ahead else None
        for part, take in zip(PARTS, takes, strict=True):
            assert torch.equal(take(draw, CPU), alone(part, draw))


def test_a_step_is_drawn_once_and_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    true = room.uniform_draw
    monkeypatch.setattr(room, "uniform_draw", lambda total, **of: (seen.append(of["step"]), true(total, **of))[1])
    noise = Noise()
    takes = [noise.join(part) for part in PARTS]
    for draw in (1, 2, 3):
        noise.following = draw + 1 if draw < 3 else None
        for take in takes:
            take(draw, CPU)
        assert seen == [step for step in range(1, min(draw + 1, 3) + 1) for _ in PARTS]


def test_a_part_that_joins_late_finds_its_noise_too() -> None:
    noise = Noise()
    first = noise.join(PARTS[0])
    first(1, CPU)
    second = noise.join(PARTS[1])
    assert torch.equal(second(1, CPU), alone(PARTS[1], 1)) and torch.equal(first(1, CPU), alone(PARTS[0], 1))
