"""What a result comes from: machine, libraries, commit."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import torch

from megatron_sat.compare.devices import device_names

LIBRARIES = ("torch", "megatron-core", "transformers", "sentencepiece", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Said in a report."""

    command: str
    """As it was typed."""
    commit: str
    machine: str
    libraries: str


def provenance(root: Path, *, command: str, also: Sequence[str] = ()) -> Provenance:
    """Of this process. root: the project's folder; also: further libraries."""
    return Provenance(command=command, commit=commit_of(root), machine=machine(), libraries=libraries(*also))


def commit_of(root: Path) -> str:
    """The commit of a folder, and whether files differ from it."""
    commit = _said(["git", "-C", str(root), "rev-parse", "--short", "HEAD"])
    if not commit:
        return "unknown"
    changed = _said(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}, with changes" if changed else commit


def machine() -> str:
    """GPUs that this process may use, if there are any, in their order, and cores.

    No other GPU counts: a run trains on those that are visible, on one of them on the first.
    """
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    if not torch.cuda.is_available():
        return cores
    try:
        names = device_names(None, python=sys.executable)
    except RuntimeError:  # a result is said to come from some GPU, rather than lost
        names = ("GPU",) * torch.cuda.device_count()
    return ", ".join([*(f"{len(list(alike))} x {name}" for name, alike in groupby(names)), cores])


def libraries(*also: str) -> str:
    """Their versions, those of further ones, and Python's."""
    found = (f"{name} {_version(name)}" for name in (*LIBRARIES, *also))
    return ", ".join([f"Python {platform.python_version()}", *found])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _said(command: list[str]) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
