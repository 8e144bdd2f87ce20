"""A command line of a small Llama-like model, to change a setting or two of."""

import shlex

import pytest

from megatron_sat.cli import ParsedExit, parse
from megatron_sat.config import Config
from megatron_sat.flags.defaults import Machine

LLAMA = """
--num-layers 4 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 8 --group-query-attention
--num-query-groups 4 --seq-length 64 --max-position-embeddings 64 --swiglu --normalization RMSNorm
--disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
--attention-dropout 0.0 --hidden-dropout 0.0 --micro-batch-size 2 --global-batch-size 8 --train-iters 100
--lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 5 --weight-decay 0.1 --clip-grad 1.0
--data-path 0.7 data/en 0.3 data/zh --split 98,1,1 --tokenizer-type NullTokenizer --vocab-size 256
"""
PAPER = "--sat-importance maxip --sat-selection sampling --sat-selection-interval 1"
"""How the paper chooses: what tests are about that name no way of their own."""
LADDER = f"--sat-schedule ladder --sat-omission-rate 0.5 --sat-schedule-start 60 --sat-rungs 5 {PAPER}"


def llama(more: str = "", *, without: str = "") -> list[str]:
    """`LLAMA` with the settings named in ``without`` left out and ``more`` behind it."""
    left_out, kept, drops = set(without.split()), [], False
    for word in shlex.split(LLAMA):
        drops = word in left_out if word.startswith("--") else drops
        kept += [] if drops else [word]
    return kept + shlex.split(more)


def run(more: str = "", *, without: str = "", ranks: int = 1, machine: Machine | None = None) -> Config:
    """The configuration of `llama` on ``ranks`` ranks; without a GPU unless ``machine`` has one."""
    machine = machine or Machine(cuda=False)
    return parse(llama(more, without=without), world_size=ranks, cuda=machine.cuda, machine=machine)


def refusal(
    capsys: pytest.CaptureFixture[str],
    more: str = "",
    *,
    without: str = "",
    ranks: int = 1,
    machine: Machine | None = None,
) -> str:
    """What is said of a command line that is refused: one line on stderr, and exit code 2."""
    with pytest.raises(ParsedExit) as stopped:
        run(more, without=without, ranks=ranks, machine=machine)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    return lines[0]
