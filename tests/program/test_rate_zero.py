"""Wall 5: a run at omission rate 0 is the dense run, bit for bit, and computes nothing more."""

from pathlib import Path

import pytest

from tests.helpers.command_line import PAPER
from tests.helpers.program import Text, read_records, trained

TEN = "--train-iters 10"
ZERO = f"--sat-schedule constant --sat-omission-rate 0 {PAPER}"


@pytest.mark.parametrize(("ranks", "layout"), [(1, ""), (2, "--tensor-model-parallel-size 2")])
def test_rate_zero_is_dense_bit_for_bit_after_ten_updates(ranks: int, layout: str, text: Text, tmp_path: Path) -> None:
    """Losses, norms, evaluations, visits and every weight; and the same operations in the books."""
    files = [tmp_path / name for name in ("dense", "zero")]
    dense, zero = (
        trained(text.command(f"{TEN} {layout} {method}"), file, ranks=ranks)
        for file, method in zip(files, ("", ZERO), strict=True)
    )
    assert len(dense.losses) == 10
    assert zero == dense
    books = [[line["executed_flops"] for line in read_records(file)] for file in files]
    assert books[0] == books[1]


def test_the_smallest_rate_that_omits_something_is_not_dense(text: Text, tmp_path: Path) -> None:
    """Of 96 channels 95 stay, of 4 query groups 3."""
    small = f"--sat-schedule constant --sat-omission-rate 0.01 {PAPER}"
    dense = trained(text.command(TEN), tmp_path / "dense")
    almost = trained(text.command(f"{TEN} {small}"), tmp_path / "almost")
    assert dense.losses[0] != almost.losses[0]
    assert not any(almost.weights[name] == digest for name, digest in dense.weights.items())
