"""examples/sft.sh and finetune_sat.py as a user calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.checkpoint.families import write_model
from tests.helpers.command_line import llama

ROOT = Path(__file__).parents[2]


def called(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    around = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=around, check=False)


def test_the_script_that_fine_tunes_is_pre_trainings_with_another_word(tmp_path: Path) -> None:
    asked = llama("--print-config --sat-preset paper-sft --train-iters 40", without="--global-batch-size")
    done = called(sys.executable, ROOT / "finetune_sat.py", *asked)
    assert done.returncode == 0, done.stderr
    assert "sft: true" in done.stdout
    assert "sat_schedule_start: 20" in done.stdout


def test_without_a_model_the_example_says_how_it_is_called() -> None:
    done = called("bash", ROOT / "examples" / "sft.sh")
    assert done.returncode == 2
    assert "examples/sft.sh MODEL OUT [settings of finetune_sat.py]" in done.stderr


STAND_IN = """#!/usr/bin/env bash
latest=$OUT/tuned/latest_checkpointed_iteration.txt
case "$*" in
    *torch.distributed.run*) mkdir -p "$OUT/tuned"; echo "$STEPS" >"$latest" ;;
    *export*) mkdir "$OUT/hf" && cp "$latest" "$OUT/hf/made_of" && echo export ;;
esac
"""
"""In the place of Python: trains to step STEPS, and exports what was trained; a folder that is there already fails."""


def test_a_run_that_was_stopped_and_went_on_is_exported_anew(tmp_path: Path) -> None:
    """--exit-interval, --exit-duration-in-mins and the stop file end a run early with exit code 0."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    for steps, said in (("4", "export"), ("8", "export"), ("8", "")):
        around = {"PYTHON": str(python), "OUT": str(out), "STEPS": steps, "GPUS": "1"}
        done = called("bash", ROOT / "examples" / "sft.sh", tmp_path, out, **around)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, said, "")
        assert (out / "hf" / "made_of").read_text().strip() == steps


@pytest.mark.slow
def test_the_example_goes_from_a_model_to_a_model_and_goes_on_where_it_was(tmp_path: Path) -> None:
    model, out = write_model("tinyllama", tmp_path / "hf"), tmp_path / "out"
    script = ["bash", ROOT / "examples" / "sft.sh", model, out]
    settings = ["--global-batch-size", "8", "--train-iters", "4", "--num-workers", "0", "--log-interval", "1"]
    around = {"TEMPLATE": "alpaca", "SEQ_LENGTH": "512", "GPUS": "1"}
    done = called(*script, *settings, **around)
    assert done.returncode == 0, done.stderr[-3000:]
    said = " ".join(done.stdout.split())
    assert "an epoch is " in said and "1-2" in said and "validation loss" in said
    AutoModelForCausalLM.from_pretrained(out / "hf")
    again = called(*script, *settings, **around)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "is already prepared" in again.stdout and "resumed from" in " ".join(again.stdout.split())
