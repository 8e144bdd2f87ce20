"""Checkpoints to and from Megatron-LM's own trainer, run for real."""

from pathlib import Path

import pytest

from megatron_sat.checkpoint.resume import open_checkpoint
from tests.checkpoint.runs import go_on, untouched
from tests.helpers.megatron_lm import megatron_lm, needs_its_trainer
from tests.helpers.ranks import run_ranks

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


@pytest.mark.slow
@needs_its_trainer
def test_megatron_lm_starts_from_our_weights_and_we_start_from_its(saved: Path, tmp_path: Path) -> None:
    flags = ("--load", str(saved), "--finetune", "--save", str(tmp_path), "--save-interval", "2")
    ended = megatron_lm(*ARGUMENTS.split(), *flags, ranks=1)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"successfully loaded checkpoint from {saved}" in ended.stdout
    opened = open_checkpoint(tmp_path)
    assert (opened.iteration, opened.header) == (2, None)
    assert "has weights of another program; pass --finetune" in run_ranks(untouched, 1, {}, tmp_path, {})[0]
    assert run_ranks(go_on, 1, {}, tmp_path, finetune=True)[0][2].iteration == 0
