"""What the table of a device keeps of the layers that were timed."""

from typing import Any

from benchmarks.rates import choosing_rows


def row(tokens: int, *, launched: float, alone: float, kept: int = 5, weights: str = "compact") -> dict[str, Any]:
    seconds = {"step_seconds_launched": launched, "step_seconds": alone}
    return {"tokens": tokens, "weights": weights, "entries": 10, "kept_entries": kept, **seconds}


def test_choosing_is_that_of_packed_layers_with_the_host_and_without():
    rows = [row(64, launched=3.0, alone=1.0), row(64, launched=4.0, alone=2.0, kept=7)]
    others = [row(64, launched=9.0, alone=9.0, weights=weights) for weights in ("dense", "gather", "plain")]
    found = choosing_rows([*others, *rows])
    assert [(each.weights, each.kept, each.seconds, each.device_seconds) for each in found] == [
        (10, 5, 3.0, 1.0),
        (10, 7, 4.0, 2.0),
    ]


def test_the_smallest_micro_batch_tells_for_less_of_it_is_noise():
    (found,) = choosing_rows([row(128, launched=30.0, alone=10.0), row(64, launched=3.0, alone=1.0)])
    assert (found.seconds, found.device_seconds) == (3.0, 1.0)


def test_noise_below_zero_is_nothing():
    (found,) = choosing_rows([row(64, launched=-0.1, alone=-0.2)])
    assert (found.seconds, found.device_seconds) == (0.0, 0.0)
