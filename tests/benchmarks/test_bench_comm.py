"""The benchmark of the reduction on two gloo ranks, from its command line to its files."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import bench_comm
from benchmarks.program import device_name
from megatron_sat.estimate.hardware import load, save, slug
from tests.estimate.tables import even
from tests.helpers.ranks import run_ranks


def said(_: int, argv: Sequence[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        bench_comm.main(argv)
    return out.getvalue()


def test_bench_comm_counts_bytes_times_every_reduction_and_compares_its_sums(tmp_path: Path) -> None:
    stored = tmp_path / "gemm-cpu.json"
    save(even(name="CPU", bytes_per_second=1e15), stored)
    line = f"--layers 2 --repeats 1 --rates 1/4 1/2 --out {tmp_path / 'comm.json'} --hardware {stored}"
    table, silent = run_ranks(said, 2, line.split())
    found = json.loads((tmp_path / "comm.json").read_text())
    rows = found["rows"]
    cases = [(row["reduction"], row["bucketed"], row["rate"]) for row in rows]
    assert cases == [(*case, rate) for case in bench_comm.CASES for rate in (0.0, 0.25, 0.5)]
    for full, quarter, half in (rows[at : at + 3] for at in range(0, len(rows), 3)):
        assert (full["share"], full["speed"]) == (1.0, 1.0)
        assert half["share"] <= 0.55  # norms and the little vocabulary are sent whole
        assert half["share"] < quarter["share"] <= 0.8
        for row in (full, quarter, half):
            assert row["seconds"] > 0
            assert row["speed"] == full["seconds"] / row["seconds"]
            assert row["apart"] == 0.0  # two ranks: bit-equal
    assert {"command", "commit", "machine", "libraries", "device"} <= found["about"].keys()
    assert (tmp_path / "comm.png").read_bytes().startswith(b"\x89PNG")
    assert "tiny, 2 layers, 2 ranks, gloo" in table
    assert found["replicas"] == 2
    assert all(row["divided"] for row in rows), "by the number of replicas, before they add"
    hardware = load(stored)
    full = [row for row in rows if row["rate"] == 0]
    assert [(each.kind, each.ranks, each.size) for each in hardware.collectives] == [
        ("all-reduce" if row["reduction"] == "all-reduce" else "reduce-scatter", 2, row["bytes"] // row["calls"])
        for row in full
    ]
    assert hardware.collectives[0].seconds == pytest.approx(full[0]["seconds"], rel=0.01)
    assert hardware.collectives_about["device"] == "CPU"
    assert f"4 collectives: {stored}" in table.replace("\n", "")
    assert not silent


def test_what_is_no_table_of_one_host_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.json"
    bench_comm.keep([], replicas=2, hosts=1, table=path)
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing was added for tools/plan.py: the table of measured products must be a file" in said
    bench_comm.keep([], replicas=16, hosts=2, table=path)
    said = " ".join(capsys.readouterr().out.split())
    assert "holds what GPUs of one host do, these are of 2: nothing was added to it" in said
    assert not path.exists()


def test_the_table_is_that_of_this_device_unless_it_is_to_stay_as_it_is() -> None:
    assert bench_comm.arguments([]).hardware.name == f"gemm-{slug(device_name())}.json"
    assert bench_comm.arguments(["--no-hardware"]).hardware is None


def test_one_rank_has_nobody_to_send_to() -> None:
    with pytest.raises(RuntimeError, match="error: one rank has nobody to send to; start at least two with torchrun"):
        run_ranks(said, 1, [])


@pytest.mark.parametrize("rate", ["0", "1"])
def test_rates_at_which_there_is_nothing_to_compare_are_refused(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_comm.arguments(["--rates", rate])
    assert "--rates must lie between 0 and 1; everything, rate 0, is always measured" in capsys.readouterr().err
