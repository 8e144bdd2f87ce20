"""What joins GPUs: measured where it was, said where it was not, and which of the two a prediction rests on."""

from typing import Any

import pytest

from megatron_sat.estimate.hardware import Collective, Hardware
from megatron_sat.estimate.links import Link, links_of
from megatron_sat.rehearsal.cluster import GPUS, Cluster
from tests.estimate.tables import even

SIZE = 10**8
ROWS = (
    Collective(kind="all-reduce", ranks=2, size=SIZE, seconds=4e-4),
    Collective(kind="all-reduce", ranks=2, size=100 * SIZE, seconds=2e-2),
)


def table(**changes: Any) -> Hardware:
    about = {"command": "python benchmarks/bench_comm.py", "commit": "abc"}
    return even(**{"name": "NVIDIA H100 80GB", "collectives": ROWS, "collectives_about": about, **changes})


def test_without_a_measurement_a_collective_takes_what_a_ring_sends_over_the_bandwidth():
    link = Link(source="said", bytes_per_second=1e9)
    for ranks in (2, 8):
        parts = sum(SIZE / ranks for _ in range(ranks - 1))
        assert link.seconds("reduce-scatter", ranks=ranks, size=SIZE) == pytest.approx(parts / 1e9)
        assert link.seconds("all-reduce", ranks=ranks, size=SIZE) == pytest.approx(2 * parts / 1e9)


def test_what_was_measured_is_returned_and_between_two_sizes_the_rate_lies_between():
    link = Link(source="said", bytes_per_second=1.0, measured=ROWS)
    for row in ROWS:
        assert link.seconds("all-reduce", ranks=2, size=row.size) == pytest.approx(row.seconds)
    rates = [row.bytes_per_second for row in ROWS]
    between = 10 * SIZE / link.seconds("all-reduce", ranks=2, size=10 * SIZE)
    assert between == pytest.approx(sum(rates) / 2)
    assert min(rates) < between < max(rates)


def test_more_ranks_send_more_at_the_measured_pace():
    link = Link(source="said", bytes_per_second=1.0, measured=ROWS[:1])
    assert link.seconds("all-reduce", ranks=8, size=SIZE) == pytest.approx(7 / 8 * 2 * ROWS[0].seconds)


def test_a_kind_that_nobody_measured_is_by_the_bandwidth():
    link = Link(source="said", bytes_per_second=1e9, measured=ROWS)
    assert link.seconds("reduce-scatter", ranks=2, size=SIZE) == pytest.approx(SIZE / 2 / 1e9)


def test_gpus_of_the_tables_kind_are_joined_as_measured_and_others_by_their_data_sheet():
    own = links_of(table(), cluster=Cluster(gpu="h100", world_size=2), network=None).inside
    assert own.measured == ROWS
    assert own.source == (
        "what was measured, 2 ranks and 100 to 10,000 MB a call: python benchmarks/bench_comm.py, commit abc"
    )
    narrow = links_of(table(), cluster=Cluster(gpu="h800", world_size=2), network=None).inside
    assert (narrow.measured, narrow.bytes_per_second) == ((), GPUS["h800"].nvlink / 2)
    assert narrow.source.startswith("the data sheet (200 GB/s a GPU), not measured: benchmarks/bench_comm.py adds that")


def test_one_size_is_said_as_one():
    own = links_of(table(collectives=ROWS[:1]), cluster=Cluster(gpu="h100", world_size=2), network=None).inside
    assert own.source.startswith("what was measured, 2 ranks and 100 MB a call: ")


def test_a_table_without_collectives_leaves_the_data_sheet():
    bare = table(collectives=(), collectives_about={})
    inside = links_of(bare, cluster=Cluster(gpu="h100", world_size=2), network=None).inside
    assert (inside.measured, inside.bytes_per_second) == ((), GPUS["h100"].nvlink / 2)


def test_hosts_are_joined_as_fast_as_somebody_says():
    cluster = Cluster(gpu="h100", world_size=16)
    assert links_of(table(), cluster=cluster, network=None).across is None
    across = links_of(table(), cluster=cluster, network=25e9).across
    assert across == Link(source="--network (25 GB/s a GPU), not measured", bytes_per_second=25e9)
