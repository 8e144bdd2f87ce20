"""tools/plan.py as a user calls it: with a table measured here, without one, and beside what was measured."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_layer, bench_step
from benchmarks.rates import add_collectives
from megatron_sat.estimate.hardware import load, save
from tests.estimate.tables import even
from tests.helpers.command_line import LADDER, llama
from tests.helpers.ranks import run_ranks
from tools import plan

SMALL = "--seq-length 64 --steps 1 --rates"


def measured(_: int, folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        layer = f"--models tiny --tokens 64 128 --vocabulary 512 {SMALL} 1/2 --weights compact"
        files = ["--out", str(folder / "layer.json"), "--hardware", str(folder / "gemm-cpu.json")]
        bench_layer.main([*layer.split(), *files])
        step = f"--model tiny --layers 2 --micro-batches 2 {SMALL} 0 1/2 --out {folder / 'step.json'}"
        bench_step.main(step.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of this machine, a layer and a step that it did."""
    folder = tmp_path_factory.mktemp("measured")
    run_ranks(measured, 1, folder)
    return folder


def called(*argv: object) -> int:
    return plan.main([str(each) for each in argv])


def test_a_run_is_predicted_from_what_this_machine_was_measured_to_do(folder, tmp_path, capsys):
    argv = [*llama(LADDER), "--hardware", folder / "gemm-cpu.json", "--json", tmp_path / "plan.json"]
    assert called(*argv) == 0
    said = capsys.readouterr().out
    assert "what a step goes to, ms" in said
    assert "from what CPU was measured to do: python benchmarks/" in said
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert 0 < stored["seconds"] < 100
    assert [rung["rate"] for rung in stored["rungs"]] == ["1/2", "2/5", "3/10", "1/5", "1/10", "0"]
    assert stored["memory_bytes"]["together"] > 0


def errors(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    assert all(row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1) for row in rows)
    return rows


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("layer", [f"layer of tiny, {tokens} tokens, rate {rate}" for tokens in (64, 128) for rate in ("0", "0.5")]),
        ("step", ["step at rate 0", "step at rate 0.5"]),
    ],
)
def test_a_prediction_stands_beside_what_was_measured(kind, names, folder, tmp_path, capsys):
    found = tmp_path / "errors.json"
    assert called("--hardware", folder / "gemm-cpu.json", "--compare", folder / f"{kind}.json", "--json", found) == 0
    rows = errors(found)
    assert [row["what"] for row in rows] == names
    for row in rows:  # a core that others use, layers of a millisecond: the units are right, no more
        assert 1 / 100 < row["predicted"] / row["measured"] < 100, row
    assert "largest error" in capsys.readouterr().out


def test_a_ladder_stands_beside_its_steps(folder, tmp_path, capsys):
    size = json.loads((folder / "step.json").read_text())["size"]
    seconds = {0.5: [0.4, 0.1, 0.1, 0.1, 0.1], 0.0: [0.1]}
    records = [{"nominal_omission_rate": rate, "step_seconds": each} for rate, all_ in seconds.items() for each in all_]
    about = {"device": "CPU", "command": "python benchmarks/bench_ladder.py --ladders cpt=6 --out ladder.json"}
    stored = {"about": about, "size": size, "rows": [], "runs": {"cpt": records}}
    (tmp_path / "ladder.json").write_text(json.dumps(stored))
    found = tmp_path / "errors.json"
    line = ["--hardware", folder / "gemm-cpu.json", "--compare", tmp_path / "ladder.json", "--json", found]
    assert called(*line) == 0
    assert [row["what"] for row in errors(found)] == ["cpt: step at rate 0.5", "cpt: 5 of 6 steps"]
    said = " ".join(capsys.readouterr().out.split())
    assert "cpt: 5 of 6 steps: first ones and changes of rung took 0.30 s more, which is not predicted" in said
    stored["runs"] = {"cpt": records[:4]}
    (tmp_path / "ladder.json").write_text(json.dumps(stored))
    assert called(*line) == 2
    said = capsys.readouterr().err
    assert "--compare must hold steps that the program's default takes (packed weights; of a rung at least 5)" in said


def predicted(folder: Path, out: Path, *more: object, **changes: Any) -> list[float]:
    """Of the steps that ``folder`` measured, had the file said this too."""
    stored = json.loads((folder / "step.json").read_text()) | changes
    (out / "step.json").write_text(json.dumps(stored))
    save(even(name="CPU"), out / "gemm-cpu.json")  # in which choosing takes time; of a busy core it may not
    line = ["--hardware", out / "gemm-cpu.json", "--compare", out / "step.json", "--json", out / "errors.json"]
    assert called(*line, *more) == 0
    return [row["predicted"] for row in errors(out / "errors.json")]


def test_a_prediction_is_of_the_flags_that_the_benchmark_ran_with(folder, tmp_path):
    again = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    plain, recomputed = predicted(folder, tmp_path), predicted(folder, tmp_path, flags=again)
    assert all(more > less for more, less in zip(recomputed, plain, strict=True))
    assert predicted(folder, tmp_path, *again.split()) == recomputed
    rarely = predicted(folder, tmp_path, "--sat-selection-interval", 1, flags="--sat-selection-interval 50")
    assert rarely == plain, "what stands on the line comes after"
    dense, sparse = predicted(folder, tmp_path, flags="--sat-selection-interval 50")
    assert (dense == plain[0], sparse < plain[1]) == (True, True)


def test_a_step_of_several_ranks_is_predicted_on_a_known_gpu_alone(folder, tmp_path, capsys):
    stored = json.loads((folder / "step.json").read_text())
    stored |= {"tensor_parallel": 2, "flags": "--sequence-parallel --use-distributed-optimizer"}
    stored["size"] |= {"replicas": 2}
    (tmp_path / "step.json").write_text(json.dumps(stored))
    assert called("--hardware", folder / "gemm-cpu.json", "--compare", tmp_path / "step.json") == 2
    assert "--compare with 4 ranks must be of a device whose NVLink is known" in capsys.readouterr().err
    save(even(name="NVIDIA H100 80GB HBM3"), tmp_path / "gemm-h100.json")
    stored["about"]["device"] = "NVIDIA H100 80GB HBM3"
    times = []
    for tensor in (1, 2):
        stored["tensor_parallel"] = tensor
        (tmp_path / "step.json").write_text(json.dumps(stored))
        line = ["--hardware", tmp_path / "gemm-h100.json", "--compare", tmp_path / "step.json"]
        assert called(*line, "--json", tmp_path / "errors.json") == 0
        times.append(errors(tmp_path / "errors.json")[0]["predicted"])
    assert times[1] < times[0]


def test_ranks_take_what_was_measured_between_them_and_the_line_says_so(folder, tmp_path, capsys):
    stored = json.loads((folder / "step.json").read_text()) | {"tensor_parallel": 2, "flags": "--sequence-parallel"}
    stored["about"]["device"] = "NVIDIA H100 80GB HBM3"
    (tmp_path / "step.json").write_text(json.dumps(stored))
    row = {"reduction": "sharded", "rate": 0.0, "bytes": 10**6, "calls": 1, "seconds": 1.0, "divided": False}
    times = []
    for name in ("sheet", "measured"):
        path = tmp_path / f"gemm-{name}.json"
        save(even(name="NVIDIA H100 80GB HBM3"), path)
        if name == "measured":
            about = {"device": "NVIDIA H100 80GB HBM3", "command": "some", "commit": "abc"}
            add_collectives(path, [row], ranks=2, about=about)
        line = ["--hardware", path, "--compare", tmp_path / "step.json", "--json", tmp_path / "errors.json"]
        assert called(*line) == 0
        times.append(errors(tmp_path / "errors.json")[0]["predicted"])
    sent = 2 * 2 * 4 * 2 * (64 * 128 * 2)  # layers, micro-batches, sums, halves; a micro-batch's bf16 activations
    slower = sent * 1e-6  # a second for 10**6 bytes, whose half each of two ranks sends
    assert times[1] - times[0] == pytest.approx(slower, rel=1e-3)
    said = " ".join(capsys.readouterr().out.split())
    assert "note: tensor parallelism communicates by the data sheet (450 GB/s a GPU), not measured" in said
    assert "communicates by what was measured, 2 ranks and 1 MB a call: some, commit abc" in said


def test_a_step_by_deepspeed_is_not_compared(folder, tmp_path, capsys):
    stored = json.loads((folder / "step.json").read_text()) | {"flags": "--engine deepspeed"}
    (tmp_path / "step.json").write_text(json.dumps(stored))
    assert called("--hardware", folder / "gemm-cpu.json", "--compare", tmp_path / "step.json") == 2
    assert "--engine must be megatron for a prediction, got deepspeed" in capsys.readouterr().err


def test_a_measurement_of_another_device_is_not_compared(folder, tmp_path, capsys):
    save(even(), tmp_path / "gemm-even.json")
    assert called("--hardware", tmp_path / "gemm-even.json", "--compare", folder / "step.json") == 2
    assert "--compare (CPU) must come from the device of the table (NVIDIA Even 80GB)" in capsys.readouterr().err


def test_a_file_that_is_no_measurement_is_not_compared(folder, tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"about": {"device": "CPU", "command": ""}, "rows": [{"seconds": 1.0}]}')
    assert called("--hardware", folder / "gemm-cpu.json", "--compare", tmp_path / "x.json") == 2
    assert "--compare must be what bench_step, bench_ladder or bench_layer wrote" in capsys.readouterr().err


def test_without_a_table_the_command_that_makes_it_is_named(tmp_path, capsys):
    assert called("--hardware", tmp_path / "none.json", *llama()) == 2
    said = capsys.readouterr().err
    assert said.startswith("plan.py: the table of measured products must be a file")
    assert "measure this device with: python benchmarks/bench_layer.py" in said
    assert called("--hardware", "b9000", *llama()) == 2
    assert "there must be one table of measured products for b9000" in capsys.readouterr().err


def test_what_the_program_refuses_is_refused_here(folder, capsys):
    assert called("--hardware", folder / "gemm-cpu.json", *llama(without="--num-layers")) == 2
    assert "--num-layers is required" in capsys.readouterr().err


def test_a_cluster_is_that_of_a_dry_run_and_its_network_is_asked_for(tmp_path, capsys):
    save(even(bytes_per_second=1e18), tmp_path / "gemm-even.json")  # dividing gradients takes no time
    line = ["--hardware", tmp_path / "gemm-even.json", *llama(f"{LADDER} --bf16"), "--gpu", "h100", "--world-size", 4]
    assert called(*line, "--gpus-per-host", 2) == 2
    assert "plan.py: --network must say how fast 2 hosts are joined" in capsys.readouterr().err
    times = []
    for speed in (0.1, 10):
        assert called(*line, "--gpus-per-host", 2, "--network", speed, "--json", tmp_path / "plan.json") == 0
        times.append(json.loads((tmp_path / "plan.json").read_text())["dense_step"]["reduction"])
    assert times[0] == pytest.approx(100 * times[1])
    assert load(tmp_path / "gemm-even.json").name in capsys.readouterr().out
