"""The folder of a comparison, which one command at a time works in; refused before anything is computed."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone until it ends, however it ends.

    Raises ValueError where no folder can be, RuntimeError while another process has it.
    """
    make_folder(folder, flag="--out")
    try:
        lock = (folder / LOCK).open("w")
    except OSError as error:
        said = f"--out must be a folder that can be written to, {folder} is not: {error}; name another"
        raise ValueError(said) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"one command at a time may work in {folder}, another does; wait for it, or name another --out"
            ) from error
        yield


def make_folder(folder: Path, *, flag: str) -> None:
    """Make it and those above it. Raises ValueError, with the flag that named it, where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"{flag} must lie where a folder can be, {folder} cannot be made: {error}; name another"
        raise ValueError(said) from error
