"""Megatron-LM's own trainer in a test: the example that trains with it, on gloo ranks of this machine."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_its_trainer = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron-core 0.16.1's wheel has no megatron.training; 0.19's has",
)


def megatron_lm(*arguments: str, ranks: int) -> subprocess.CompletedProcess[str]:
    """How examples/megatron_lm ends with these arguments."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = [str(ROOT / "tests/helpers/megatron_lm_on_cpu.py"), str(ROOT / "examples/megatron_lm/pretrain_gpt_sat.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    # DeepSpeed sets it where it is imported; torch then takes a machine without a driver for one with a GPU
    environment.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    return subprocess.run(
        [*launch, *script, *arguments], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
