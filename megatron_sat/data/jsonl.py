"""Lines of text files, plain or compressed, and which files they are. Knows nothing of JSON or tokens.

Compression goes by the name: .gz, .xz, .zst, else none. A file that ends too early is an error that names the
line, and so is a line that no memory could hold. Names inside a compressed file are not looked at.
"""

import glob
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_sat.data.side_file import Source

_READ = 1 << 17
"""Bytes read at a time."""
_READ_ZST = 1 << 12
"""The same of .zst, of which four bytes may stand for 128 KiB."""
LONGEST_LINE = 1 << 28
"""Bytes of a line; a few kilobytes of .xz may hold gigabytes without an end of line."""


def find_inputs(patterns: Sequence[str], *, said: str = "--input") -> list[Path]:
    """The files that paths and globs name: in the order given, those of a glob by name.

    said: the flag that names them.
    Raises ValueError for a path that does not exist, a glob without a match, and a file named twice.
    """
    found: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  takes absolute ones
        if not matches:
            raise ValueError(f"{said} must name existing files, {pattern} matches none; check the path")
        found += [Path(match) for match in matches]
    if not found:
        raise ValueError(f"{said} must name at least one file, got none; add a .jsonl file")
    for path in found:
        if path.is_dir():
            raise ValueError(f"{said} must name files, {path} is a folder; write '{path}/*.jsonl'")
        if found.count(path) > 1:
            raise ValueError(
                f"{said} must name a file once, {path} is named {found.count(path)} times; drop one"
            )
    return found


def describe(path: Path, *, advance: Callable[[int], None]) -> Source:
    """Size and sha256 of a file as it lies on disk; ``advance`` is told the bytes as they are read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
            advance(len(data))
        return Source(path=str(path), bytes=file.tell(), sha256=digest.hexdigest())


class Lines:
    """The lines of one file, without their line ends, and how far the file on disk has been read.

    Iterate once. Raises ValueError, naming the line, where the compressed file is damaged or ends too early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = self._told = 0

    def __iter__(self) -> Iterator[bytes]:
        number = 0
        try:
            with self.path.open("rb") as raw:
                for line in _split(self._count(raw)):
                    number += 1
                    yield line
        except _TooLong as error:
            raise ValueError(
                f"{self.path}:{number + 1} must have at most {LONGEST_LINE} bytes before its end of line, it has more; "
                "check that the file is jsonl"
            ) from error
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise ValueError(
                f"{self.path} must be a whole {self.path.suffix} file, it is damaged after line {number}: "
                f"{error}; fetch it again"
            ) from error

    def newly_read(self) -> int:
        """Bytes of the file on disk that were read since the last call; for a progress bar."""
        new, self._told = self._read - self._told, self._read
        return new

    def _count(self, raw: BinaryIO) -> Iterator[bytes]:
        if self.path.suffix in _OPENERS and not raw.read(1):
            raise EOFError("it is empty")  # for gzip and zstandard that is no error
        raw.seek(0)
        for chunk in _OPENERS.get(self.path.suffix, _plain)(raw):
            self._read = raw.tell()
            yield chunk


class _TooLong(Exception):
    """A line without an end."""


def _split(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines of a stream of chunks; the last one may lack its end. A CR before the LF goes with it."""
    begun: list[bytes] = []
    length = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        begun.append(first)
        length = len(others[-1]) if others else length + len(first)
        for other in others:
            yield b"".join(begun).removesuffix(b"\r")
            begun = [other]
        if length > LONGEST_LINE:
            raise _TooLong
    if rest := b"".join(begun):
        yield rest.removesuffix(b"\r")


def _plain(raw: BinaryIO) -> Iterator[bytes]:
    while chunk := raw.read(_READ):
        yield chunk


def _gzip(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=raw) as stream:
        while chunk := stream.read(_READ):
            yield chunk


def _xz(raw: BinaryIO) -> Iterator[bytes]:
    with lzma.LZMAFile(raw) as stream:
        while chunk := stream.read(_READ):
            yield chunk


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Frame by frame, because zstandard's own reader takes a truncated file for a short one."""
    unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)  # as `zstd --long=31` writes
    frame = None
    while data := raw.read(min(_READ, _READ_ZST)):
        while data:
            frame = frame or unpacker.decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the last frame has no end")


_OPENERS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {".gz": _gzip, ".xz": _xz, ".zst": _zstd}
