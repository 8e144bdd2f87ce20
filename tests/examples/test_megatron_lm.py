"""The example for those who keep Megatron-LM's trainer, run for real: two gloo ranks, its own pretrain(), mock data."""

import re
import subprocess

import pytest

from tests.helpers.megatron_lm import megatron_lm, needs_its_trainer

pytestmark = needs_its_trainer
MEGATRON_ARGUMENTS = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 8 --group-query-attention --num-query-groups 4
    --ffn-hidden-size 96 --seq-length 32 --max-position-embeddings 32 --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --transformer-impl local --use-cpu-initialization
    --distributed-backend gloo --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-persist-layer-norm --no-rope-fusion --micro-batch-size 2 --global-batch-size 4
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --clip-grad 1.0 --log-interval 1 --eval-interval 1000
    --eval-iters 1 --num-workers 0 --tokenizer-type NullTokenizer --vocab-size 127 --mock-data --train-iters 4
    --tensor-model-parallel-size 2 --seed 7
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return megatron_lm(*MEGATRON_ARGUMENTS.split(), *arguments, ranks=2)


def losses(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"lm loss: ([0-9.E+-]+) \| loss scale", output)]


LADDER = "--sat-schedule ladder --sat-omission-rate 0.5 --sat-schedule-start 2 --sat-rungs 1"


@pytest.fixture(scope="module")
def sparse() -> subprocess.CompletedProcess[str]:
    return run(*LADDER.split(), "--sat-omitted-neurons", "frozen")


def test_the_example_trains_sparse_and_then_dense(sparse: subprocess.CompletedProcess[str]) -> None:
    assert sparse.returncode == 0, sparse.stderr[-3000:]
    rates = re.findall(r"step (\d) omission rates \{'attention': ([0-9.]+), 'mlp': ([0-9.]+)\}", sparse.stdout)
    assert rates == [("1", "0.5", "0.5"), ("2", "0.5", "0.5"), ("3", "0.0", "0.0"), ("4", "0.0", "0.0")]


@pytest.mark.slow
def test_its_losses_differ_from_dense_training_from_the_first_step_on(sparse: subprocess.CompletedProcess[str]) -> None:
    dense = run()
    assert dense.returncode == 0, dense.stderr[-3000:]
    assert len(losses(dense.stdout)) == len(losses(sparse.stdout)) == 4
    assert all(a != b for a, b in zip(losses(dense.stdout), losses(sparse.stdout), strict=True))


@pytest.mark.slow
def test_it_obeys_what_says_where_and_how_neurons_are_left_out(sparse: subprocess.CompletedProcess[str]) -> None:
    seen = {"both": losses(sparse.stdout)}
    ways = ("--sat-modules mlp", "--sat-omit backward", "--sat-omit weight-gradient")
    for flags in ways:
        found = run(*LADDER.split(), *flags.split())
        assert found.returncode == 0, found.stderr[-3000:]
        seen[flags] = losses(found.stdout)
        assert ("'attention'" in found.stdout) is (flags != "--sat-modules mlp")
    dense = losses(run().stdout)
    assert seen["--sat-omit backward"][0] == seen["--sat-omit weight-gradient"][0] == dense[0]  # an exact forward
    assert len({tuple(each) for each in (*seen.values(), dense)}) == 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--sat-selection mixed-growing", "use pretrain_sat.py --baseline mst-structured"),
        ("--sat-schedule mst", "use pretrain_sat.py --baseline mst-structured"),
        ("--sat-whole-ends 1", "--sat-whole-ends (1) at both ends must leave some of the 2 layers"),
        ("--sat-weights compact", "unrecognized arguments: --sat-weights"),
        ("--sat-selection-interval 2", "--sat-selection-interval (2) must be 1"),
    ],
)
@pytest.mark.slow
def test_it_refuses_what_it_could_not_obey(flags: str, said: str) -> None:
    refused = run(*flags.split())
    assert refused.returncode != 0
    assert said in refused.stderr
