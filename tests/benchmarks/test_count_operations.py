"""Operations of a layer: counted as they are asked for, more where a step chooses."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.count_operations import Operations, main


def test_operations_are_counted_and_views_are_not() -> None:
    a = torch.ones(2, 3)
    with Operations() as counted:
        (a.t() @ a).view(9).add_(1)
    assert counted.count == 2


def test_a_choice_costs_operations_and_one_that_is_kept_fewer(tmp_path: Path) -> None:
    rows = main(["--micro-batches", "1", "2", "--out", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == rows
    for number in (1, 2):
        dense, kept, each, paper = (row["operations"] for row in rows if row["micro-batches"] == number)
        assert dense < kept < min(each, paper)
    assert rows[4]["operations"] == pytest.approx(2 * rows[0]["operations"], rel=0.1)  # dense, twice the micro-batches


def test_there_is_at_least_one_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--micro-batches", "0"])
    assert "--micro-batches must be at least 1, got 0" in capsys.readouterr().err
