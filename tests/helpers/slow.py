"""Which cases of a test `make test` leaves out."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(names: Iterable[str], *, fast: Collection[str]) -> list[Any]:
    """Parameters of a test: those of ``fast`` as they are, the others marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
