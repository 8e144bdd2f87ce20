"""A data set under construction: tokens are appended, progress committed, and only a whole one is named.

Until then everything lies in the folder ``PREFIX.unfinished``:

    tokens.bin   the future .bin, append only          lengths.bin   i32 tokens of each document, append only
    progress.json   the job, what of its input is done, and how long both files were then          lock

A killed run leaves files that may be longer than progress.json says; the next one cuts them there and goes
on. The order of `finish` (.bin, .idx, .json last) makes each moment of a crash either the unfinished folder
or the whole set.
"""

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megatron_sat.data.index_file import bin_path, idx_path, write_index
from megatron_sat.data.side_file import SideFile, Totals, side_path, sync_folder, write_side_file, write_whole


@dataclass(frozen=True, kw_only=True)
class Position:
    """How much of the input is done: all sources before ``source``, and ``line`` lines of that one."""

    source: int = 0
    line: int = 0


class Draft:
    """Opens or continues the draft of ``prefix``; a context manager that keeps other runs out.

    job: what decides the output; a draft of another job is thrown away (`resumed` is False then).
    Raises RuntimeError while another process works on it.
    """

    def __init__(self, prefix: str, *, job: dict[str, Any], dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, dtype
        self._job = json.loads(json.dumps(job))  # as it will be read back: tuples become lists
        self.folder = draft_folder(prefix)
        self.position, self.totals = Position(), Totals()
        self.resumed = False
        self._tokens: BinaryIO
        self._lengths: BinaryIO

    def __enter__(self) -> "Draft":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise RuntimeError(
                f"one process at a time may prepare {self.prefix}, another holds {self.folder}; wait for it "
                "or end it"
            ) from error
        self._continue_or_start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._lengths.close()
        self._lock.close()

    def append(self, tokens: np.ndarray, *, lengths: np.ndarray) -> None:
        """Add documents. tokens: ids of all in a row, of the draft's dtype. lengths: [documents]."""
        self._tokens.write(tokens.tobytes())
        self._lengths.write(np.asarray(lengths, dtype="<i4").tobytes())

    def commit(self, position: Position, *, totals: Totals) -> None:
        """From here on a crash spares what was appended, which covers the input up to ``position``."""
        self.position, self.totals = position, totals
        for file in (self._tokens, self._lengths):
            file.flush()
            os.fsync(file.fileno())
        progress = {
            "job": self._job,
            "position": asdict(position),
            "totals": asdict(totals),
            "sizes": [self._tokens.tell(), self._lengths.tell()],
        }
        write_whole(self.folder / "progress.json", json.dumps(progress).encode())

    def finish(self, side: SideFile) -> None:
        """Give the data set its name and remove the draft. Replaces what had the name; commit first."""
        lengths = np.fromfile(self.folder / "lengths.bin", dtype="<i4")
        write_index(self.folder / "index.idx", lengths, dtype=self.dtype)
        for stale in (side_path(self.prefix), idx_path(self.prefix)):
            stale.unlink(missing_ok=True)
        (self.folder / "tokens.bin").replace(bin_path(self.prefix))
        (self.folder / "index.idx").replace(idx_path(self.prefix))
        sync_folder(self.folder.parent)
        write_side_file(self.prefix, side)
        shutil.rmtree(self.folder)

    def discard(self) -> None:
        """Remove the draft, done or not."""
        shutil.rmtree(self.folder)

    def _continue_or_start(self) -> None:
        tokens_size, lengths_size = 0, 0
        progress = read_progress(self.prefix)
        if progress is not None and progress["job"] == self._job:
            self._take_back(progress["sizes"][0])
            if self._reach(progress["sizes"]):
                tokens_size, lengths_size = progress["sizes"]
                self.position, self.totals = Position(**progress["position"]), Totals(**progress["totals"])
                self.resumed = True
        if not self.resumed:  # what progress.json speaks of is about to go
            (self.folder / "progress.json").unlink(missing_ok=True)
        self._tokens = _open_at(self.folder / "tokens.bin", tokens_size)
        self._lengths = _open_at(self.folder / "lengths.bin", lengths_size)

    def _take_back(self, size: int) -> None:
        """A run that died inside `finish` had already named the .bin."""
        named = bin_path(self.prefix)
        if not (self.folder / "tokens.bin").exists() and named.exists() and named.stat().st_size == size:
            idx_path(self.prefix).unlink(missing_ok=True)
            named.replace(self.folder / "tokens.bin")

    def _reach(self, sizes: list[int]) -> bool:
        """Whether both files are as long as was committed; a lost one means a fresh start."""
        paths = (self.folder / "tokens.bin", self.folder / "lengths.bin")
        return all(
            path.exists() and path.stat().st_size >= size for path, size in zip(paths, sizes, strict=True)
        )


def draft_folder(prefix: str) -> Path:
    """Where the draft of ``prefix`` lies until it is whole."""
    return Path(f"{prefix}.unfinished")


def read_progress(prefix: str) -> dict[str, Any] | None:
    """The committed progress of the draft of ``prefix``, or None where there is no draft."""
    path = draft_folder(prefix) / "progress.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def _open_at(path: Path, size: int) -> BinaryIO:
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file
