"""What a run says and leaves behind: console, figures, configuration, plan, visits; and the script itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sat.training.visits import load_visits
from tests.helpers.program import SPARSE, Text, read_records, start, trained

ROOT = Path(__file__).parents[2]


RUN = f"{SPARSE} --eval-interval 4 --log-interval 3"


@pytest.fixture(scope="module")
def left(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks, and in it its TensorBoard."""
    folder = tmp_path_factory.mktemp("run")
    flags = f"{RUN} --tensor-model-parallel-size 2 --save {folder} --tensorboard-dir {folder / 'tensorboard'}"
    ended = start(text.command(flags), ranks=2)
    assert ended.codes == [0, 0], ended.err
    return folder


def test_jsonl_and_tensorboard_tell_the_same(left: Path) -> None:
    windows = read_records(left / "metrics.jsonl")
    evaluations = read_records(left / "metrics.jsonl", kind="validation")
    events = EventAccumulator(str(left / "tensorboard"))
    events.Reload()
    for name in ("loss", "grad_norm", "nominal_omission_rate", "tokens_per_second", "executed_tflops", "step_seconds"):
        scalars = events.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == [w["step"] for w in windows] == [3, 6, 7]
        assert [s.value for s in scalars] == pytest.approx([w[name] for w in windows])
    assert [s.value for s in events.Scalars("train/omission_rate_mlp")] == [0.5, 0.0, 0.0]
    assert [e["step"] for e in evaluations] == [4, 7]
    losses = [e["loss"]["religion"] for e in evaluations]
    assert [s.value for s in events.Scalars("validation/religion")] == pytest.approx(losses)


def test_configuration_plan_and_visits_lie_beside_the_checkpoint(left: Path) -> None:
    assert {path.name for path in left.iterdir()} == {
        "config.yaml",
        "iter_0000007",
        "latest_checkpointed_iteration.txt",
        "metrics.jsonl",
        "plan.json",
        "tensorboard",
        "visits.npz",
    }
    plan = json.loads((left / "plan.json").read_text())
    rungs = [(rung["first"], rung["last"], rung["rate_exact"]) for rung in plan["rungs"]]
    assert rungs == [(1, 3, "1/2"), (4, 4, "1/4"), (5, 7, "0")]
    assert set(plan["epochs"]) == {"poetry", "en"}
    visits = load_visits(left / "visits.npz")
    assert visits.steps == 7
    assert visits.layers("attention") == visits.layers("mlp") == [1, 2, 3, 4]


def script(argv: list[str], *launcher: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """pretrain_sat.py itself, started in another folder than the project's."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "pretrain_sat.py"), *argv],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        check=False,
    )


def test_the_script_under_torchrun_says_what_is_in_use_the_plan_and_each_window_once(
    text: Text, tmp_path: Path
) -> None:
    """From one of its two ranks; and nothing on stderr."""
    argv = text.command(f"{RUN} --tensor-model-parallel-size 2", without="--log-interval")
    torchrun = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0"
    ended = script(argv, *torchrun.split(), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert [line for line in ended.stderr.splitlines() if line.strip()] == []

    lines = ended.stdout.splitlines()
    assert sum("torch's AdamW" in line for line in lines) == 1
    assert sum("2 ranks: tensor 2, pipeline 1, context 1, data 1" in line for line in lines) == 1
    assert sum("plan (quotas: 2 query groups, 48 channels)" in line for line in lines) == 1
    assert sum("time saved over a dense run: at most" in line for line in lines) == 1
    windows = [line for line in lines if "| loss" in line]
    assert [line.split("|")[0].split()[-1] for line in windows] == ["3", "6", "7"]
    for part in ("grad norm", "lr ", "omission 0.500 (attention 0.500 mlp 0.500)", "tokens/s", "TFLOP/s executed"):
        assert part in windows[0]
    evaluations = [line for line in lines if "validation loss" in line]
    assert [line.split("|")[0].split()[-1] for line in evaluations] == ["4", "7"]
    assert all("religion" in line and "en" in line for line in evaluations)


def test_the_script_without_a_launcher_is_one_rank_and_refuses_in_one_line(text: Text, tmp_path: Path) -> None:
    ended = script(text.command("--tokenizer-model /nowhere"), cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: tokenizer_model must be a local path, /nowhere does not exist; fetch it (no hub is asked)\n"
    )


def test_a_printed_configuration_and_a_saved_one_are_the_same_run(text: Text, tmp_path: Path) -> None:
    flags = f"{SPARSE} --sat-importance contribution --save {tmp_path / 'run'}"
    printed = start(text.command(f"{flags} --print-config"))
    assert (printed.codes, printed.err) == ([0], "")
    assert not (tmp_path / "run").exists(), "printing writes nothing"
    (tmp_path / "printed.yaml").write_text(printed.out)

    run = trained(text.command(flags), tmp_path / "first.jsonl")
    saved = tmp_path / "run" / "config.yaml"
    again = tmp_path / "again"
    for file in (tmp_path / "printed.yaml", saved):
        argv = ["--config", str(file), "--save", str(again)]
        assert trained(argv, tmp_path / "again.jsonl") == run
    settings = yaml.safe_load(saved.read_text())
    assert settings["sparsity"]["sat_omission_rate"] == "0.5"
    assert settings["sparsity"]["sat_seed"] == 1234, "what was resolved is written down"


def test_a_setting_behind_the_file_overrides_it(text: Text, tmp_path: Path) -> None:
    printed = start(text.command(f"{SPARSE} --print-config"))
    (tmp_path / "printed.yaml").write_text(printed.out)
    run = trained(["--config", str(tmp_path / "printed.yaml"), "--sat-seed", "7"], tmp_path / "seed.jsonl")
    assert run == trained(text.command(f"{SPARSE} --sat-seed 7"), tmp_path / "flag.jsonl")
    assert run.losses != trained(text.command(SPARSE), tmp_path / "other.jsonl").losses


def test_help_lists_the_methods_flags_and_ends(text: Text) -> None:
    ended = start(["--help"])
    assert ended.codes == [0]
    assert "--sat-omission-rate" in ended.out
