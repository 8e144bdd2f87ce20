"""Run a program and leave how much memory it took at most, and of which commit it was.

    python -m megatron_sat.compare.measured --into FOLDER pretrain_sat.py ARGUMENTS ...

Each process writes FOLDER/measured-HOST-PROCESS.json, whatever way the program ends. With a GPU it is what torch had
allocated on it; without one, the resident memory of the process. Of a resumed run the highest figure counts.
"""

import json
import os
import platform
import resource
import runpy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_sat.compare.provenance import commit_of

_USAGE = "measured: --into FOLDER PROGRAM ARGUMENTS"
_PATTERN = "measured-*.json"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process, or all of a run together, left."""

    peak_memory_bytes: int
    """The highest of any process."""
    device: str
    """cuda or cpu: which memory."""
    commits: tuple[str, ...]
    """Of the project; one, unless the run was resumed after a change."""


def main(argv: Sequence[str]) -> None:
    """Run what the command line names. Raises ValueError for a command line without a program."""
    if len(argv) < 3 or argv[0] != "--into":
        raise ValueError(f"measured must be given a folder and a program, got {' '.join(argv)!r}; write {_USAGE}")
    folder, program = Path(argv[1]), Path(argv[2]).resolve()
    sys.argv = [argv[2], *argv[3:]]
    sys.path[0] = str(program.parent)
    commit = commit_of(program.parent)  # now: files may change while it runs
    try:
        runpy.run_path(str(program), run_name="__main__")
    finally:
        _leave(folder / _PATTERN.replace("*", f"{platform.node()}-{os.getpid()}"), commit=commit)


def _leave(path: Path, *, commit: str) -> None:
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    found = Measured(peak_memory_bytes=_peak(cuda=cuda), device=device, commits=(commit,))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(found)) + "\n")


def _peak(*, cuda: bool) -> int:
    if cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def read_measured(folder: Path) -> Measured:
    """Of all processes of a run. Raises ValueError where nothing was measured."""
    paths = sorted(folder.glob(_PATTERN), key=lambda path: path.stat().st_mtime_ns)
    found = [Measured(**json.loads(path.read_text())) for path in paths]
    if not found:
        raise ValueError(f"{folder} must hold what was measured of a run, it does not; remove it and run it again")
    return Measured(
        peak_memory_bytes=max(each.peak_memory_bytes for each in found),
        device=found[0].device,
        commits=tuple(dict.fromkeys(commit for each in found for commit in each.commits)),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
