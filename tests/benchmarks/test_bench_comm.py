"""The benchmark of the reduction on two gloo ranks, from its command line to its files."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import bench_comm
from tests.helpers.ranks import run_ranks


def said(_: int, argv: Sequence[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        bench_comm.main(argv)
    return out.getvalue()


def test_bench_comm_counts_bytes_times_every_reduction_and_compares_its_sums(tmp_path: Path) -> None:
    line = f"--layers 2 --repeats 1 --rates 1/4 1/2 --out {tmp_path / 'comm.json'}"
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
    assert not silent


def test_one_rank_has_nobody_to_send_to() -> None:
    with pytest.raises(RuntimeError, match="error: one rank has nobody to send to; start at least two with torchrun"):
        run_ranks(said, 1, [])


@pytest.mark.parametrize("rate", ["0", "1"])
def test_rates_at_which_there_is_nothing_to_compare_are_refused(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_comm.arguments(["--rates", rate])
    assert "--rates must lie between 0 and 1; everything, rate 0, is always measured" in capsys.readouterr().err
