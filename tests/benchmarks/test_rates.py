"""What the table of a device keeps of the layers that were timed, and of what several devices sent each other."""

from typing import Any

import pytest

from benchmarks.rates import add_collectives, choosing_rows, collective_rows, collectives_in
from megatron_sat.estimate.hardware import Collective, load, save
from tests.estimate.tables import STREAM, even


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


def reduction(*, seconds: float = 0.5, kind: str = "all-reduce", calls: int = 1, divided: bool = True, rate: float = 0):
    return {
        "reduction": kind,
        "rate": rate,
        "bytes": 8 * 10**9,
        "calls": calls,
        "seconds": seconds,
        "divided": divided,
        "bucketed": calls > 1,
    }


DIVIDED = 2 * 8 * 10**9 / STREAM
"""Seconds that the even device takes to read and write these bytes."""


def test_a_collective_is_a_whole_reduction_without_dividing_its_gradients():
    rows = [reduction(), reduction(rate=0.5), reduction(kind="sharded", calls=4), reduction(divided=False)]
    assert collective_rows(rows, ranks=2, bytes_per_second=STREAM) == [
        Collective(kind="all-reduce", ranks=2, size=8 * 10**9, seconds=pytest.approx(0.5 - DIVIDED)),
        Collective(kind="reduce-scatter", ranks=2, size=2 * 10**9, seconds=pytest.approx((0.5 - DIVIDED) / 4)),
        Collective(kind="all-reduce", ranks=2, size=8 * 10**9, seconds=0.5),
    ]


def test_a_reduction_that_is_faster_than_its_division_is_not_of_this_machine():
    with pytest.raises(ValueError, match=r"longer than dividing its gradients \(80 ms by .*\), got 70 ms; measure"):
        collective_rows([reduction(seconds=0.07)], ranks=2, bytes_per_second=STREAM)


def test_collectives_go_into_the_table_of_their_device_and_replace_older_ones(tmp_path):
    path, about = tmp_path / "gemm-even.json", {"device": even().name, "command": "some", "commit": "any"}
    save(even(), path)
    assert collectives_in(path, device=even().name) == {"collectives": (), "collectives_about": {}}
    for seconds in (0.3, 0.5):
        added = add_collectives(path, [reduction(seconds=seconds)], ranks=2, about=about)
    row = Collective(kind="all-reduce", ranks=2, size=8 * 10**9, seconds=0.5 - DIVIDED)
    assert added == load(path) == even(collectives=(row,), collectives_about=about)
    assert collectives_in(path, device=even().name) == {"collectives": (row,), "collectives_about": about}
    assert even(**collectives_in(path, device=even().name)) == load(path), "what measuring the device again keeps"


def test_another_devices_table_takes_no_collectives_and_gives_none(tmp_path):
    path, about = tmp_path / "gemm-even.json", {"device": "NVIDIA Odd", "command": "some", "commit": "any"}
    save(even(), path)
    with pytest.raises(ValueError, match="--hardware must be the table of NVIDIA Odd, .* of NVIDIA Even 80GB; name"):
        add_collectives(path, [reduction()], ranks=2, about=about)
    assert load(path) == even()
    add_collectives(path, [reduction()], ranks=2, about=about | {"device": even().name})
    assert collectives_in(path, device="NVIDIA Odd") == {}


def test_without_a_readable_table_there_are_none_to_keep(tmp_path):
    assert collectives_in(tmp_path / "none.json", device="CPU") == {}
    (tmp_path / "broken.json").write_text("{")
    assert collectives_in(tmp_path / "broken.json", device="CPU") == {}
