"""The engine and its checkpoints on GPUs through NCCL, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(ranks: int, folder: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what torch's deterministic algorithms ask for
    }
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ended = subprocess.run(
        [*program, str(ROOT / "tests/checkpoint/gpu_run.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "resumed on the GPU as if never stopped" in ended.stdout


@pytest.mark.gpu
def test_a_run_on_a_gpu_holds_entries_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    run(1, tmp_path)


@pytest.mark.multi_gpu
def test_a_run_on_two_gpus_holds_entries_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    run(2, tmp_path)
