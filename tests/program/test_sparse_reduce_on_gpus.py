"""`--sat-sparse-reduce` through NCCL, on streams of its own: two GPUs train bit for bit as without it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.program import SPARSE, Text, read_records

ROOT = Path(__file__).parents[2]
OVERLAPPED = "--overlap-grad-reduce --ddp-bucket-size 30000"
CASES = {
    "all-reduce, overlapped": OVERLAPPED,
    "sharded": "--use-distributed-optimizer",
    "sharded, overlapped": f"--use-distributed-optimizer {OVERLAPPED} --overlap-param-gather",
}


def figures(argv: list[str], jsonl: Path) -> list[tuple[Any, ...]]:
    """Losses and norms of a run on two GPUs."""
    environment = {
        **os.environ,
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what torch's deterministic algorithms ask for
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, str(ROOT / "pretrain_sat.py"), *argv, "--log-jsonl", str(jsonl)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [(record["loss"], record["grad_norm"]) for record in read_records(jsonl)]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("case", CASES)
def test_two_gpus_train_bit_for_bit_as_with_the_full_reduction(case: str, text: Text, tmp_path: Path) -> None:
    argv = text.command(f"{SPARSE} --bf16 --deterministic-mode --sat-channel-multiple 8 {CASES[case]}")
    full = figures(argv, tmp_path / "full.jsonl")
    assert len(full) == 7
    assert figures([*argv, "--sat-sparse-reduce"], tmp_path / "sparse.jsonl") == full
