"""Checkpoints to and from Megatron-LM's own trainer, run for real."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sat.checkpoint.resume import open_checkpoint
from tests.checkpoint.runs import go_on, untouched
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).parents[2]
ARGUMENTS = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --ffn-hidden-size 48 --seq-length 16 --max-position-embeddings 16 --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --transformer-impl local --use-cpu-initialization
    --distributed-backend gloo --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-persist-layer-norm --no-rope-fusion
    --micro-batch-size 2 --global-batch-size 4 --lr 3e-3 --log-interval 1 --eval-interval 1000 --eval-iters 1
    --num-workers 0 --tokenizer-type NullTokenizer --vocab-size 95 --make-vocab-size-divisible-by 96
    --mock-data --train-iters 2 --seed 7
"""


def megatron_lm(*arguments: str) -> str:
    """What Megatron-LM's pretrain() prints on one gloo rank."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    script = [
        str(ROOT / "tests/helpers/megatron_lm_on_cpu.py"),
        str(ROOT / "examples/megatron_lm/pretrain_gpt_sat.py"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    ended = subprocess.run(
        [*launch, *script, *ARGUMENTS.split(), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron-core 0.16.1's wheel has no megatron.training; 0.19's has",
)
def test_megatron_lm_starts_from_our_weights_and_we_start_from_its(saved: Path, tmp_path: Path) -> None:
    said = megatron_lm("--load", str(saved), "--finetune", "--save", str(tmp_path), "--save-interval", "2")
    assert f"successfully loaded checkpoint from {saved}" in said
    opened = open_checkpoint(tmp_path)
    assert (opened.iteration, opened.header) == (2, None)
    assert "has weights of another program; pass --finetune" in run_ranks(untouched, 1, {}, tmp_path, {})[0]
    assert run_ranks(go_on, 1, {}, tmp_path, finetune=True)[0][2].iteration == 0
