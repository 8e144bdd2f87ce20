"""A step cut into laps: what is a layer's, what is the step's, and how long a device is held back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks import layers, timing
from benchmarks.layers import time_layer


class Clock:
    """Advances when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(layers, "time", clock)
    return clock


def test_a_step_is_its_micro_batches_and_what_is_beyond_them(clock):
    """Choosing before the first, packing in it, unpacking in the last, closing the step after it."""
    calls = 0

    def layer(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        place, calls = calls % 5, calls + 1
        clock.now += 2.0 + {0: 0.5, 4: 0.25}.get(place, 0.0)
        return x * 2

    @contextmanager
    def opened(step: int) -> Iterator[None]:
        clock.now += 0.125
        yield
        clock.now += 0.0625

    def before() -> None:
        clock.now += 100.0

    found = time_layer(
        layer, inputs=torch.ones(2, requires_grad=True), steps=3, micro_batches=5, opened=opened, before=before
    )
    assert found.layer_seconds == found.layer_seconds_launched == 2.0
    assert found.step_seconds == found.step_seconds_launched == 0.5 + 0.25 + 0.125 + 0.0625
    assert found.host_seconds == pytest.approx((5 * 2.0 + 0.9375) / 5)
    assert calls == 2 * (3 + layers.WARM_UP) * 5


def test_the_first_steps_are_not_counted(clock):
    calls = 0

    def layer(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        clock.now += 1.0 if calls > 4 * layers.WARM_UP else 1000.0
        return x + 1

    found = time_layer(layer, inputs=torch.ones(2, requires_grad=True), steps=1, micro_batches=4)
    assert found.layer_seconds_launched == 1.0
    assert found.step_seconds_launched == 0.0


def test_a_layers_gradient_is_not_added_to_the_one_before(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    inputs = torch.ones(2, requires_grad=True)
    time_layer(lambda x: 3 * x, inputs=inputs, steps=1, micro_batches=4)
    assert inputs.grad is not None
    assert inputs.grad.tolist() == [3.0, 3.0]


def test_too_few_micro_batches_have_no_lap_of_the_layer_alone():
    with pytest.raises(AssertionError, match="3 micro-batches have no lap between the first and the last two"):
        time_layer(lambda x: x, inputs=torch.ones(2, requires_grad=True), steps=1, micro_batches=3)


def test_a_device_is_held_back_for_the_step_only_where_the_host_is_the_slow_one():
    assert layers._enough(4.0, whole=4.5, micro_batches=4) == pytest.approx(4.8)
    assert layers._enough(4.0, whole=40.0, micro_batches=4) == pytest.approx(1.2)


def test_the_median_is_of_single_calls_after_two_rounds(clock):
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        clock.now += 50.0 if calls <= 2 * 4 else float(calls)

    assert timing.median_seconds(work, repeats=3, calls=4) == pytest.approx(14.5)
    assert calls == 4 * 5


def test_laps_are_between_marks():
    laps = timing.Laps()
    for _ in range(3):
        laps.mark()
        time.sleep(0.01)
    assert len(laps.seconds()) == 2
    assert all(seconds >= 0.01 for seconds in laps.seconds())
