"""Each benchmark from its command line to its files, at a size that a CPU does in a second."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_ladder, bench_layer, bench_step
from benchmarks.ladders import LADDERS, read_records
from megatron_sat import pretrain
from megatron_sat.estimate import hardware
from tests.estimate.tables import even
from tests.helpers.ranks import run_ranks

SMALL = "--seq-length 32 --vocabulary 128".split()
PNG = b"\x89PNG\r\n"


def said(_: int, main: Callable[..., None], argv: Sequence[object], more: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([str(each) for each in argv], **more)
    return out.getvalue()


def run(main: Callable[..., None], *argv: object, **more: Any) -> str:
    """What the benchmark prints, in a process that has imported everything."""
    return run_ranks(said, 1, main, argv, more)[0]


def test_bench_step_times_dense_sparse_and_both_twins(tmp_path):
    line = "--model tiny --layers 1 --seq-length 32 --micro-batches 2 --steps 1 --rates 0 1/2 --twin fp32 bf16"
    table = run(bench_step.main, *line.split(), "--out", tmp_path / "step.json")
    found = json.loads((tmp_path / "step.json").read_text())
    cases = [(row["rate"], row["weights"]) for row in found["rows"]]
    assert cases == [(0, "dense"), (0.5, "compact"), (0.5, "gather"), (0, "plain, fp32"), (0, "plain, bf16")]
    dense, compact, gather, plain, _ = found["rows"]
    assert (dense["speed"], plain["flops"]) == (1.0, dense["flops"])
    assert compact["flops"] == gather["flops"] < dense["flops"]
    for row in found["rows"]:
        assert row["seconds"] > 0
        assert row["speed"] == dense["seconds"] / row["seconds"]
        assert row["bound"] == dense["flops"] / row["flops"]
        assert row["tokens_per_second"] == 64 / row["seconds"]
    assert {"command", "commit", "machine", "libraries", "device"} <= found["about"].keys()
    assert (found["flags"], found["tensor_parallel"]) == ("", 1)
    assert (tmp_path / "step.png").read_bytes().startswith(PNG)
    assert "tiny, 1 layers, 2x1x32 tokens" in table


@pytest.mark.parametrize(
    ("flags", "title"),
    [
        ((), "tiny, 1 layers, 2x1x32 tokens, 2 replicas"),
        (("--tensor-parallel", "2", "--flags=--sequence-parallel"), "tiny, 1 layers, 2x1x32 tokens\n"),
    ],
)
def test_bench_step_times_ranks_that_share_the_work(flags, title, tmp_path):
    line = "--model tiny --layers 1 --seq-length 32 --micro-batches 2 --steps 1 --weights compact --out"
    tables = [run_ranks(said, 2, bench_step.main, [*line.split(), tmp_path / "step.json", *flags], {})]
    assert title in tables[0][0]
    assert tables[0][1] == ""
    found = json.loads((tmp_path / "step.json").read_text())
    rows = found["rows"]
    assert (found["flags"], found["tensor_parallel"]) == (("--sequence-parallel", 2) if flags else ("", 1))
    assert [row["weights"] for row in rows] == ["dense", "compact"]
    tokens = 2 * 32 * (1 if flags else 2)
    assert all(row["tokens_per_second"] == tokens / row["seconds"] for row in rows)
    assert all(row["executed_tflops"] == pytest.approx(row["flops"] / row["seconds"] / 2e12) for row in rows)


@pytest.mark.parametrize(
    ("flags", "said_then"),
    [
        (("--tensor-parallel", "2"), "--tensor-parallel must divide the ranks (1), got 2"),
        (("--tensor-parallel", "0"), "--tensor-parallel must divide the ranks (1), got 0"),
    ],
)
def test_bench_step_refuses_ranks_that_are_not_there(flags, said_then, capsys):
    with pytest.raises(SystemExit):
        bench_step.arguments(flags)
    assert said_then in capsys.readouterr().err


def test_bench_step_has_a_twin_for_one_process_alone(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        bench_step.arguments(["--twin"])
    assert "--twin is of one process, got 2 ranks; leave it out" in capsys.readouterr().err


def test_bench_step_without_a_dense_step_has_nothing_to_compare_with(capsys):
    with pytest.raises(SystemExit):
        bench_step.arguments(["--rates", "1/2"])
    assert "--rates must hold 0, the dense step that the others are compared with" in capsys.readouterr().err


def test_bench_step_without_twins_takes_none_and_a_bare_flag_is_fp32():
    assert bench_step.arguments([]).twin == []
    assert bench_step.arguments(["--twin"]).twin == ["fp32"]


def test_bench_layer_times_a_layer_and_leaves_a_table_of_the_hardware(tmp_path):
    line = [*SMALL, *"--tokens 32 64 --rates 1/2 --steps 1 --models tiny --flags=--sat-temperature=0.1".split()]
    files = ["--out", tmp_path / "layer.json", "--hardware", tmp_path / "gemm-cpu.json"]
    collectives = (hardware.Collective(kind="all-reduce", ranks=2, size=10**6, seconds=1e-3),)
    added = even(name="CPU", collectives=collectives, collectives_about={"command": "some", "commit": "any"})
    hardware.save(added, tmp_path / "gemm-cpu.json")
    table = run(bench_layer.main, *line, *files)
    stored = json.loads((tmp_path / "layer.json").read_text())
    rows = stored["rows"]
    assert stored["flags"] == "--sat-temperature=0.1"
    assert [(row["tokens"], row["rate"], row["weights"]) for row in rows] == [
        (tokens, rate, weights)
        for tokens in (32, 64)
        for rate, weights in ((0, "dense"), (0.5, "compact"), (0.5, "gather"), (0, "plain"))
    ]
    for row in rows:
        assert row["layer_seconds"] > 0
        assert row["layer_seconds_launched"] > 0
    assert [row["bound"] for row in rows] == [1.0, 2.0, 2.0, 1.0] * 2
    assert "one layer of tiny, 64 tokens" in table
    assert (tmp_path / "layer.png").read_bytes().startswith(PNG)
    found = hardware.load(tmp_path / "gemm-cpu.json")
    assert found.name == "CPU"
    assert (found.collectives, found.collectives_about) == (added.collectives, added.collectives_about)
    assert found.bytes_per_second != added.bytes_per_second, "all else is measured again"
    assert len({each.sizes for each in found.products if each.kind == "forward"}) > 30
    dense = [each.sizes for each in found.products if each.kind == "weight"]
    assert (3 * 128, 128, 64) in dense, "QKV's rows, its inputs, and the tokens they are summed over"
    assert {each.sizes for each in found.attention} >= {(8, 32, 16), (16, 32, 16), (4, 32, 16)}
    assert [(each.weights, each.kept) for each in found.choosing] == [(200704, 100352)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--micro-batches 3", "--micro-batches must be at least 4, got 3: laps between first and last"),
        ("--weights gather", "--weights must hold compact, whose choosing the hardware's file needs"),
        ("--flags=--layer-graphs", "--flags must be without --layer-graphs for the hardware's file: it holds launches"),
        ("--tokens 100 --seq-length 64", "--tokens must be multiples of --seq-length (64), got 100"),
    ],
)
def test_bench_layer_refuses_what_cannot_be_measured(line, complaint, capsys):
    with pytest.raises(SystemExit):
        bench_layer.arguments(line.split())
    assert complaint in capsys.readouterr().err
    if "gather" in line or "graphs" in line:
        assert bench_layer.arguments([*line.split(), "--no-hardware"]).hardware is None


def train_here(argv: Sequence[str], *, log: Path) -> list[dict[str, Any]]:
    """The program, in a process that has imported everything."""
    run_ranks(_program, 1, [*argv, "--log-interval", "1", "--log-jsonl", str(log)])
    return read_records(log)


def _program(_: int, argv: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert pretrain.main(argv) == 0


def test_bench_ladder_runs_dense_and_both_ladders(tmp_path, capsys):
    line = [*SMALL, *"--model tiny --layers 1 --micro-batches 1 --ladders cpt=12 sft=8".split()]
    more = ["--flags=--clip-grad=0.5", "--out", str(tmp_path / "ladder.json")]
    bench_ladder.main([*line, *more], train=train_here)
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert found["flags"] == "--clip-grad=0.5"
    runs = {name: [record["nominal_omission_rate"] for record in records] for name, records in found["runs"].items()}
    rates = {
        name: [float(rung.rate) for rung in LADDERS[name].schedule(steps) for _ in range(rung.steps)]
        for name, steps in (("cpt", 12), ("sft", 8))
    }
    assert runs == {"dense": [0.0] * 12, **rates}
    cpt, sft = found["rows"]
    assert (cpt["steps"], sft["steps"]) == (12, 8)
    seconds = [record["step_seconds"] for record in found["runs"]["dense"]]
    assert sft["dense_seconds"] == pytest.approx(sum(seconds[:8]))
    assert cpt["paper_bound"] == pytest.approx(0.36, abs=0.05)
    assert (tmp_path / "ladder.png").read_bytes().startswith(PNG)
    shown = capsys.readouterr().out
    assert "too few steps for the rung(s) of rate 0.4" in shown


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("cpt", "--ladders must be NAME=STEPS, of cpt, sft, got cpt; try cpt=60"),
        ("other=3", "--ladders must be NAME=STEPS, of cpt, sft, got other=3; try cpt=60"),
        ("cpt=61", "must have a multiple of 3 steps, for the ladder starts at 2000 of 3000, got 61; try 60"),
    ],
)
def test_bench_ladder_refuses_a_ladder_it_cannot_build(written, complaint, capsys):
    with pytest.raises(SystemExit):
        bench_ladder.arguments(["--ladders", written])
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("script", ["bench_step.py", "bench_layer.py", "bench_ladder.py"])
def test_the_scripts_start_from_anywhere(script, tmp_path):
    command = [sys.executable, str(Path(bench_step.__file__).parent / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "usage:" in done.stdout) == (0, True), done.stderr


@pytest.mark.slow
def test_bench_ladder_runs_the_program_itself(tmp_path, capsys):
    line = [*SMALL, *"--model tiny --layers 1 --micro-batches 1 --ladders sft=4".split()]
    bench_ladder.main([*line, "--out", str(tmp_path / "ladder.json")])
    runs = json.loads((tmp_path / "ladder.json").read_text())["runs"]
    assert [len(records) for records in runs.values()] == [4, 4]
