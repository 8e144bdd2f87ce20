"""Checkpoints need the repaired libraries, as every entry point has them."""

import pytest

from megatron_sat import faults


@pytest.fixture(autouse=True, scope="session")
def repaired_libraries() -> None:
    faults.apply_all()
