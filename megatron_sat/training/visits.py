"""The record of which neurons took part how often, as a file: the trainer writes it, whoever plots reads it.

A .npz without pickled objects: ``steps``, the number of steps counted, and a row of counts a module, named
``attention.<layer>`` and ``mlp.<layer>`` with layers from 1. A count is the steps in which that unit (a head
or query group, a channel) was kept; in a dense step all of them are.
"""

import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

KINDS = ("attention", "mlp")
_NAME = re.compile(r"(attention|mlp)\.([1-9]\d*)")
_UNREADABLE = (
    OSError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise, one or the other, over damaged or foreign bytes."""


@dataclass(frozen=True, kw_only=True)
class Visits:
    """How often each unit was kept."""

    steps: int
    """Steps counted."""
    counts: dict[str, np.ndarray]
    """By ``kind.layer``: [units] integers in 0..steps."""

    def __post_init__(self) -> None:
        for name, counts in self.counts.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"visits must be named attention.<layer> or mlp.<layer> from 1, got {name!r}")
            if counts.ndim != 1 or counts.dtype.kind not in "iu" or not counts.size:
                raise ValueError(
                    f"visits of {name} must be a row of whole numbers, one a neuron, "
                    f"got {counts.dtype} of shape {counts.shape}; hand over the counts themselves"
                )
            if counts.min() < 0 or counts.max() > self.steps:
                raise ValueError(
                    f"visits of {name} must be between 0 and the steps counted ({self.steps}), "
                    f"got {counts.min()} to {counts.max()}; both must be of the same run"
                )

    def layers(self, kind: str) -> list[int]:
        """The numbers of the layers that have such a module, ascending."""
        return sorted(int(name.split(".")[1]) for name in self.counts if name.startswith(f"{kind}."))

    def shares(self, kind: str) -> np.ndarray:
        """[layers, units] float: the share of the steps in which each unit of "attention" or "mlp" was kept.

        Raises ValueError before the first step, without such modules, and where layers differ in units.
        """
        if self.steps == 0:
            raise ValueError("visits must be of at least one step, got 0 steps; plot them after training")
        rows = [self.counts[f"{kind}.{layer}"] for layer in self.layers(kind)]
        sizes = sorted({row.size for row in rows})
        if len(sizes) != 1:
            raise ValueError(
                f"{kind} must have as many units in every layer, got {sizes or 'no layer'}; "
                "one run's model has one shape"
            )
        return np.stack(rows) / self.steps


def save_visits(path: str | os.PathLike[str], visits: Mapping[str, Tensor | np.ndarray], *, steps: int) -> None:
    """Write the counts of whole layers (all TP ranks), by ``kind.layer``, after ``steps`` steps, or nothing.

    Raises ValueError for counts that cannot be.
    """
    plain = {name: np.asarray(row.cpu() if isinstance(row, Tensor) else row) for name, row in visits.items()}
    record = Visits(steps=steps, counts=plain)
    fresh = Path(f"{os.fspath(path)}.partial")
    arrays: dict[str, Any] = record.counts
    with fresh.open("wb") as file:
        np.savez_compressed(file, steps=np.int64(record.steps), **arrays)
    fresh.replace(path)


def load_visits(path: str | os.PathLike[str]) -> Visits:
    """What `save_visits` wrote. Raises ValueError for a file that is missing or not of that kind."""
    if not Path(path).is_file():
        raise ValueError(f"visits must be a file, {os.fspath(path)} does not exist; a sparse run writes it")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            read = {name: arrays[name] for name in arrays.files}
        return Visits(steps=int(read.pop("steps")), counts=read)
    except _UNREADABLE as error:
        raise ValueError(
            f"visits must be what a sparse run wrote, {os.fspath(path)} is damaged: {error}; copy it again"
        ) from error
