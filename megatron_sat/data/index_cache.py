"""What surrounds Megatron's index caches: one builder at a time, nothing half-written used, nothing compiled.

megatron.core writes its .npy files under their final names and takes one that exists for whole. A start that
is killed while it writes, or two that share a folder, would leave a later one a truncated file. Rank 0 builds
under a lock whose content says whether the last builder got to the end.
"""

import fcntl
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core.datasets import utils as megatron_utils

_CACHES = ("*-GPTDataset-*", "*-BlendedDataset-*")


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Alone in ``folder`` while inside; files of a builder that did not get to its end are removed first.

    Waits for another process that is inside. Raises OSError where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if lock.read():
            _remove_newer(folder, than=Path(lock.name))
        lock.truncate(0)
        lock.write("building\n")
        lock.flush()  # its time of modification is the beginning of this build, by the file system's clock
        yield
        lock.truncate(0)


def _remove_newer(folder: Path, *, than: Path) -> None:
    begun = than.stat().st_mtime_ns
    for pattern in _CACHES:
        for path in folder.glob(pattern):
            if path.stat().st_mtime_ns >= begun:
                path.unlink()


def use_prebuilt_index_helpers() -> None:
    """Let megatron use the C++ index helpers that its wheel brings, and nothing compile them.

    ``compile_helpers`` of megatron-core 0.16.1 and 0.19 calls ``make`` in its own folder and ends the process
    when that fails, and the wheel has the compiled helper but no Makefile. May go when the wheel has one, or
    checks first.
    Raises RuntimeError when the helper is missing or made for another Python.
    """
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError as error:
        raise RuntimeError(
            f"megatron.core's compiled index helper must be importable, it is not: {error}; "
            "install megatron-core from a wheel for this Python"
        ) from error
    megatron_utils.compile_helpers = _compile_nothing


def _compile_nothing() -> None:
    """Stands in for `compile_helpers`: there is nothing left to compile."""
