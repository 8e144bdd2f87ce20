"""Whatever the layout, a run is the run of one process: the same losses, norms, evaluations and neurons."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.testing import assert_close

from tests.helpers.program import SPARSE, Text, Trained, each_once, trained
from tests.helpers.tolerances import EXACT, RUN_LOSS, RUN_NORM

METHODS = {"dense": "", "sparse": SPARSE}
OURS = (
    f"{SPARSE} --sat-importance contribution --sat-statistics lagged --sat-selection-interval 2 --sat-gqa head "
    "--sat-rescale inverse-keep --sat-omitted-neurons frozen"
)
"""What the paper has not, together."""
TP, PP = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
OVERLAPPED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RECOMPUTE = "--recompute-granularity"
WIDE = "--micro-batch-size 4"
"""What two replicas read at a time."""


class Case(NamedTuple):
    """A layout on some ranks, and the one process whose first micro-batch has the same tokens."""

    ranks: int
    flags: str
    alone: str = ""
    exact: bool = False
    """The operations are the same, in the same order."""


LAYOUTS = {
    "tp 2": Case(2, TP),
    "tp 2, sequence parallel": Case(2, f"{TP} --sequence-parallel"),
    "pp 2": Case(2, PP),
    "pp 2, interleaved": Case(2, f"{PP} --num-virtual-stages-per-pipeline-rank 2"),
    "pp 2, the first embeds": Case(2, f"{PP} --pipeline-model-parallel-layout 'E|ttttL'"),
    "cp 2": Case(2, "--context-parallel-size 2"),
    "dp 2": Case(2, "", WIDE),
    "dp 2, distributed optimizer, overlapped": Case(2, OVERLAPPED, WIDE),
    "tp 2, sequence parallel, dp 2, overlapped": Case(4, f"{TP} --sequence-parallel {OVERLAPPED}", WIDE),
    "full recomputation": Case(1, f"{RECOMPUTE} full --recompute-method uniform --recompute-num-layers 2", exact=True),
    "recomputed layers, pp 2": Case(2, f"{PP} {RECOMPUTE} full --recompute-method block --recompute-num-layers 1"),
    "recomputed modules": Case(1, f"{RECOMPUTE} selective --recompute-modules core_attn mlp", exact=True),
    "recomputed norms": Case(1, f"{RECOMPUTE} selective --recompute-modules layernorm"),
}

MUCH_LIKE_ANOTHER = [
    (layout, "dense") for layout in ("tp 2", "pp 2", "pp 2, the first embeds", "dp 2", "recomputed layers, pp 2")
]


@pytest.fixture(scope="module")
def train(text: Text, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """(flags, ranks) to a run from the common weights; each is run once."""
    folder = tmp_path_factory.mktemp("runs")
    return each_once(folder, lambda flags: text.command(f"--load {weights} --finetune {flags}"))


def assert_same_run(one: Trained, other: Trained, *, exact: bool = False) -> None:
    assert len(one.losses) == 7
    assert_close(one.losses, other.losses, **(EXACT if exact else RUN_LOSS))
    assert_close(one.validation, other.validation, **(EXACT if exact else RUN_LOSS))
    assert_close(one.norms, other.norms, **(EXACT if exact else RUN_NORM))
    assert one.visits == other.visits


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        pytest.param(layout, method, marks=pytest.mark.slow if (layout, method) in MUCH_LIKE_ANOTHER else [])
        for layout in LAYOUTS
        for method in METHODS
    ],
)
def test_a_layout_trains_as_one_process_does(layout: str, method: str, train: Callable[..., Trained]) -> None:
    case = LAYOUTS[layout]
    run = train(f"{METHODS[method]} {case.flags}", case.ranks)
    assert_same_run(run, train(f"{METHODS[method]} {case.alone}"), exact=case.exact)


@pytest.mark.parametrize(
    "layout",
    [
        "tp 2, sequence parallel",
        "pp 2, interleaved",
        "cp 2",
        "dp 2, distributed optimizer, overlapped",
        "recomputed norms",
    ],
)
def test_options_that_the_paper_has_not_hold_in_layouts_too(layout: str, train: Callable[..., Trained]) -> None:
    case = LAYOUTS[layout]
    assert_same_run(train(f"{OURS} {case.flags}", case.ranks), train(f"{OURS} {case.alone}"))


def test_an_evaluation_of_fewer_micro_batches_than_stages_reads_each_sample_once(
    text: Text, weights: Path, tmp_path: Path
) -> None:
    """One poem is one micro-batch, where an interleaved pipeline passes on two at a time."""
    data = f"--data-path {text.prefix('zh/poetry')} --split 59,1,0 {WIDE} --load {weights} --finetune"
    argv = text.command(data, without="--train-data-path --valid-data-path")
    interleaved = f"{PP} --num-virtual-stages-per-pipeline-rank 2".split()
    alone = trained(argv, tmp_path / "one.jsonl")
    run = trained([*argv, *interleaved], tmp_path / "two.jsonl", ranks=2)
    assert len(run.validation) == 1
    assert_same_run(run, alone)


ACCUMULATED = {"dense": "", "sparse": f"{SPARSE} --sat-importance magnitude"}
"""Scores that no token enters, so that a first micro-batch of another size chooses alike."""


@pytest.mark.parametrize("method", ACCUMULATED)
def test_accumulated_gradients_train_as_one_large_micro_batch_does(method: str, train: Callable[..., Trained]) -> None:
    large = train(f"{ACCUMULATED[method]} --micro-batch-size 8")
    assert_same_run(train(f"{ACCUMULATED[method]} --micro-batch-size 2"), large)


@pytest.mark.parametrize(
    "changes",
    [
        "--seed 7 --sat-seed 1234",
        "--sat-seed 7",
        "--sat-selection-groups 1",
        "--sat-schedule-start 2",
        "--micro-batch-size 4",
    ],
)
def test_another_run_is_told_apart(changes: str, train: Callable[..., Trained]) -> None:
    """Other samples, other noise, other quotas, another rung edge, another first micro-batch."""
    other, run = train(f"{SPARSE} {changes}"), train(SPARSE)
    assert max(abs(a / b - 1) for a, b in zip(other.losses, run.losses, strict=True)) > 20 * RUN_LOSS["rtol"]
    with pytest.raises(AssertionError):
        assert_same_run(other, run)


def test_sparse_runs_leave_neurons_out_and_dense_runs_do_not(train: Callable[..., Trained]) -> None:
    dense, sparse = train(METHODS["dense"]), train(METHODS["sparse"])
    assert {count for row in dense.visits.values() for count in row} == {7}
    assert set(sparse.visits) == {f"{kind}.{n}" for kind in ("attention", "mlp") for n in range(1, 5)}
    for name, row in sparse.visits.items():
        units = 4 if name.startswith("attention") else 96
        kept = [units // 2] * 3 + [units // 2 if units == 4 else 72] + [units] * 3  # .25 of two groups: one
        assert (len(row), sum(row)) == (units, sum(kept))


GATHERED = "--sat-weights gather"


@pytest.mark.parametrize("layout", ["tp 2, sequence parallel", "pp 2, interleaved", "full recomputation"])
def test_packed_weights_train_as_gathered_ones_do(layout: str, train: Callable[..., Trained]) -> None:
    case = LAYOUTS[layout]
    assert_same_run(train(f"{SPARSE} {case.flags}", case.ranks), train(f"{SPARSE} {case.flags} {GATHERED}", case.ranks))


def test_packed_weights_and_overlapped_reduction_train_as_gathered_ones_do(train: Callable[..., Trained]) -> None:
    assert_same_run(train(f"{SPARSE} {OVERLAPPED}", 2), train(f"{SPARSE} {OVERLAPPED} {GATHERED}", 2))
