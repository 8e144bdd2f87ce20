"""Checkpoints need the repaired libraries, as every entry point has them."""

from pathlib import Path

import pytest

from megatron_sat import faults
from tests.checkpoint.runs import to_the_end
from tests.helpers.ranks import run_ranks


@pytest.fixture(autouse=True, scope="session")
def repaired_libraries() -> None:
    faults.apply_all()


@pytest.fixture(scope="package")
def saved(repaired_libraries: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after the second of five steps of one fp32 process; only to be read."""
    root = tmp_path_factory.mktemp("saved")
    run_ranks(to_the_end, 1, {}, root)
    return root
