"""Runs that omit in the backward or in weights' gradients alone: the first loss is the dense one's, and ranks share the
work as ever."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.program import SPARSE, Text, Trained, each_once, trained

BACKWARD, WEIGHTS = (f"{SPARSE} --sat-omit {omit}" for omit in ("backward", "weight-gradient"))
RANDOM = "--sat-importance uniform"
"""It looks at no token: replicas have other first micro-batches."""


@pytest.fixture(scope="module")
def alone(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """What is omitted to the run of one process; each is run once."""
    return each_once(tmp_path_factory.mktemp("alone"), lambda omit: text.command(f"{omit} {RANDOM}"))


def test_the_first_loss_is_the_dense_one(text: Text, tmp_path: Path) -> None:
    dense, exact, weights, sparse = (
        trained(text.command(flags), tmp_path / f"{number}.jsonl")
        for number, flags in enumerate(("", BACKWARD, WEIGHTS, SPARSE))
    )
    assert [exact.losses[0], weights.losses[0]] == pytest.approx([dense.losses[0]] * 2, rel=1e-6)
    assert exact.norms[0] != pytest.approx(dense.norms[0], rel=1e-3)
    assert weights.norms[0] < 0.999 * dense.norms[0]  # it is of fewer entries of the same gradient
    assert weights.norms[0] != pytest.approx(exact.norms[0], rel=1e-3)
    assert sparse.losses[0] != pytest.approx(dense.losses[0], rel=1e-6)


@pytest.mark.parametrize(
    ("omit", "flags", "ranks"),
    [
        (BACKWARD, "--tensor-model-parallel-size 2 --sequence-parallel", 2),
        (BACKWARD, "--use-distributed-optimizer --overlap-grad-reduce", 2),
        (BACKWARD, "--sat-weights gather", 1),
        (BACKWARD, "--layer-graphs", 1),
        (BACKWARD, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1),
        (WEIGHTS, "--tensor-model-parallel-size 2", 2),
        (WEIGHTS, "--tensor-model-parallel-size 2 --sequence-parallel", 2),
        (WEIGHTS, "--use-distributed-optimizer --overlap-grad-reduce", 2),
        (WEIGHTS, "--sat-sparse-reduce", 2),
        (WEIGHTS, "--sat-weights gather", 1),
        (WEIGHTS, "--layer-graphs", 1),
        (WEIGHTS, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1),
    ],
)
def test_however_it_is_computed_it_is_the_same_run(
    omit: str, flags: str, ranks: int, text: Text, tmp_path: Path, alone: Callable[[str], Trained]
) -> None:
    found = trained(text.command(f"{omit} {RANDOM} {flags}"), tmp_path / "found.jsonl", ranks=ranks)
    expected = alone(omit)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    assert found.visits == expected.visits
