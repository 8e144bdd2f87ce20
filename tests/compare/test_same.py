"""Two runs are the same where every record and every weight is, and the first difference is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_sat.compare.runs import METRICS
from megatron_sat.compare.same import difference, main


def _run(folder: Path, weights: dict[str, torch.Tensor], **record: Any) -> Path:
    """A run's folder with one record and a checkpoint of these tensors."""
    entry = {"kind": "train", "step": 1, "loss": 2.0, "grad_norm": 1.0, "elapsed_seconds": 3.0, **record}
    folder.mkdir()
    (folder / METRICS).write_text(json.dumps(entry) + "\n")
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    dcp.save(weights, checkpoint_id=folder / "iter_0000001", no_dist=True)
    (folder / "iter_0000001" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


MATRIX = torch.arange(6.0).reshape(2, 3)
WEIGHTS = {"a.weight": MATRIX, "b.weight": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return _run(tmp_path / "one", WEIGHTS)


def test_a_run_is_the_same_as_its_copy(one: Path, tmp_path: Path) -> None:
    shutil.copytree(one, tmp_path / "copy")
    assert difference(one, tmp_path / "copy") is None


def test_time_and_what_a_controller_keeps_are_left_out(one: Path, tmp_path: Path) -> None:
    own = {**WEIGHTS, "sat.mlp.1.visits": torch.ones(2)}
    other = _run(tmp_path / "other", own, elapsed_seconds=9.0, omission_rate={"mlp": 0.0})
    assert difference(one, other) is None


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"loss": 2.0000001}, "loss of step 1: 2.0 against 2.0000001"),
        ({"grad_norm": float("nan")}, "grad_norm of step 1: 1.0 against nan"),
        ({"more": 1}, "more of step 1: None against 1"),
    ],
)
def test_another_record_is_named(record: dict[str, Any], says: str, one: Path, tmp_path: Path) -> None:
    assert difference(one, _run(tmp_path / "other", WEIGHTS, **record)) == says


def test_losses_that_are_no_number_are_as_good_as_themselves(tmp_path: Path) -> None:
    nans = [_run(tmp_path / name, WEIGHTS, loss=float("nan")) for name in ("x", "y")]
    assert difference(*nans) is None


def test_a_missing_record_is_named(one: Path, tmp_path: Path) -> None:
    other = _run(tmp_path / "other", WEIGHTS)
    (other / METRICS).write_text((other / METRICS).read_text() * 2)
    assert difference(one, other) == "1 records against 2"


def _evaluated(run: Path, *losses: float) -> Path:
    """The run with evaluations after its step."""
    lines = [{"kind": "validation", "step": 1, "elapsed_seconds": 3.0, "loss": {"zh": loss}} for loss in losses]
    (run / METRICS).write_text((run / METRICS).read_text() + "".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ((2.5, 2.5), None),
        ((2.0, 2.5, 2.5), None),  # the last counts: reports have it
        ((2.5, 2.0), "loss of step 1: {'zh': 2.5} against {'zh': 2.0}"),
        ((), "2 records against 1"),
    ],
)
def test_an_evaluation_that_a_finished_run_repeats_is_one(
    losses: tuple[float, ...], says: str | None, one: Path, tmp_path: Path
) -> None:
    """A run that was ended between its last checkpoint and its end goes on with that."""
    again = _evaluated(_run(tmp_path / "again", WEIGHTS), *losses)
    assert difference(_evaluated(one, 2.5), again) == says


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({**WEIGHTS, "a.weight": MATRIX + 2.0**-20 * torch.eye(2, 3)}, "a.weight, by 9.54e-07 at most"),
        ({**WEIGHTS, "a.weight": torch.where(MATRIX == 0, -0.0, MATRIX)}, "a.weight, by 0 at"),
        ({**WEIGHTS, "b.weight": torch.ones(4)}, r"b.weight is (4,) torch.bfloat16 against (4,) torch.float32"),
        ({**WEIGHTS, "a.weight": torch.ones(6)}, r"a.weight is (2, 3) torch.float32 against (6,) torch.float32"),
        ({"a.weight": MATRIX}, "the tensor b.weight is in one checkpoint alone"),
    ],
)
def test_another_weight_is_named(weights: dict[str, torch.Tensor], says: str, one: Path, tmp_path: Path) -> None:
    found = difference(one, _run(tmp_path / "other", weights))
    assert found is not None
    assert found.startswith(says)


def test_a_folder_without_records_is_refused(one: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold the metrics.jsonl of a run, it does not; train with --save"):
        difference(one, tmp_path)


def test_what_differs_is_written(one: Path, tmp_path: Path) -> None:
    main([str(one), str(one), "--output", str(tmp_path / "same.json")])
    assert json.loads((tmp_path / "same.json").read_text())["difference"] is None
