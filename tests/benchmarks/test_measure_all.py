"""The script that measures everything: each of its commands is one that the benchmarks take."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench_comm, bench_ladder, bench_layer, bench_step, profile_step

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "measure_all.sh"
MODULES = (bench_comm, bench_ladder, bench_layer, bench_step, profile_step)
BENCHMARKS = {f"{module.__name__.split('.')[-1]}.py": module for module in MODULES}
PARTS = "layer step one tinyllama kernels cpt sft replicas tensor zero comm".split()


def measure(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    more = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([SCRIPT, *words], capture_output=True, text=True, env={**os.environ, **more})


def test_every_part_is_a_command_that_its_benchmark_takes(tmp_path, monkeypatch):
    done = measure(str(tmp_path), *PARTS, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(PARTS)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    for name, line in zip(PARTS, lines, strict=True):
        words = shlex.split(line)
        script = next(word for word in words if word.endswith(".py"))
        monkeypatch.setenv("WORLD_SIZE", "2" if "torch.distributed.run" in words else "1")
        arguments = BENCHMARKS[Path(script).name].arguments
        assert arguments(words[words.index(script) + 1 :]).out == tmp_path / f"{name}.json"
    assert list(tmp_path.iterdir()) == []


def test_without_two_gpus_only_the_parts_for_one_are_measured(tmp_path):
    done = measure(str(tmp_path), DRY_RUN="1")
    assert [Path(line.split()[-1]).stem for line in done.stdout.splitlines()] == PARTS[:7]


def test_a_part_that_fails_is_named_at_the_end(tmp_path):
    done = measure(str(tmp_path), "kernels")
    assert done.returncode == 1
    assert "measure_all.sh: failed: kernels" in done.stderr
    assert "a GPU must be there, found none" in (tmp_path / "kernels.err").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "measure_all.sh: OUT must name a folder for the results"),
        (("out", "layers"), "measure_all.sh: PART must be one of layer step one tinyllama kernels cpt sft replicas"),
    ],
)
def test_what_it_cannot_measure_it_refuses(words, said):
    done = measure(*words, DRY_RUN="1")
    assert done.returncode == 2
    assert said in done.stderr
