"""Megatron's data set on disk, .bin and .idx: written, read and, above all, checked.

``PREFIX.bin`` holds token ids, one document after another. ``PREFIX.idx`` holds (little endian)

    9 bytes magic | u64 version 1 | u8 dtype code | u64 sequences n | u64 documents + 1 = m
    n x i32 lengths in tokens | n x i64 byte offsets in the .bin | m x i64 first sequence of each document

megatron.core reads the same files without asking whether they are whole: a truncated .idx ends in an
assertion, a .bin of another .idx in random text. `read_index` asks, in bounded memory; training itself reads
through megatron.core. Plain numpy, so that preparing text needs neither torch's nor megatron's start-up time;
tests hold both to one another.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of integer types; 6 and 7 are megatron's floats, which are no token ids."""
_BLOCK = 1 << 22
"""Entries that are looked at together: 32 MiB of offsets."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a checked .idx says."""

    dtype: np.dtype
    lengths: np.ndarray
    """[sequences] i32, tokens in each."""
    documents: int

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


def bin_path(prefix: str) -> Path:
    """The file of token ids."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str) -> Path:
    """The file that says where documents begin."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type for ids below ``vocab_size``; megatron's own rule."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def write_index(path: Path, lengths: np.ndarray, *, dtype: np.dtype) -> None:
    """Write an .idx for documents of one sequence each, and force it to disk.

    lengths: [documents] tokens in each, in the order of the .bin. dtype: of the .bin, one of `token_dtype`'s.
    """
    code = next(code for code, name in _DTYPES.items() if np.dtype(name) == dtype)
    offsets = np.zeros(len(lengths) + 1, dtype="<i8")
    np.cumsum(lengths, dtype="<i8", out=offsets[1:])
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1))
        np.asarray(lengths, dtype="<i4").tofile(file)
        (offsets[:-1] * dtype.itemsize).tofile(file)
        np.arange(len(lengths) + 1, dtype="<i8").tofile(file)
        file.flush()
        os.fsync(file.fileno())


def read_index(prefix: str) -> Index:
    """The .idx of ``prefix``, having checked every entry of it and that it describes this .bin to the last
    byte.

    Raises ValueError for a missing file, another format, a truncated file, entries that contradict each other
    or the .bin, and a data set without tokens.
    """
    index, data = idx_path(prefix), bin_path(prefix)
    for path, other in ((data, index), (index, data)):
        if not path.exists():
            beside = (
                f"though {other.name} is there; its preparation was interrupted"
                if other.exists()
                else "nor the other"
            )
            raise ValueError(
                f"a data path must name a .bin and an .idx, {path} does not exist, {beside}; "
                "check the path or run tools/preprocess_data.py"
            )
    dtype, sequences, entries = _read_header(index)
    lengths = np.fromfile(index, dtype="<i4", count=sequences, offset=_HEADER.size)
    if not lengths.any():
        raise ValueError(
            f"a data set must hold tokens, {prefix} has none; prepare it from text that is not empty"
        )
    offsets = np.memmap(
        index, dtype="<i8", mode="r", offset=_HEADER.size + 4 * sequences
    )  # [sequences + entries]
    _check_offsets(index, lengths=lengths, offsets=offsets[:sequences], dtype=dtype)
    _check_documents(index, starts=offsets[sequences:], sequences=sequences)
    described, found = int(lengths.sum(dtype=np.int64)) * dtype.itemsize, data.stat().st_size
    if described != found:
        raise _corrupt(
            index,
            rule=f"describe {data.name} to its end",
            value=f"{described} bytes described, {found} found",
        )
    return Index(dtype=dtype, lengths=lengths, documents=entries - 1)


def documents(prefix: str, index: Index) -> Iterator[np.ndarray]:
    """The ids of each document, one after another; sequences of one document are put together."""
    before = _HEADER.size + 12 * len(index.lengths)
    entries = np.memmap(idx_path(prefix), dtype="<i8", mode="r", offset=before)  # [documents + 1]
    ends = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)))[entries]  # in tokens
    ids = np.memmap(bin_path(prefix), dtype=index.dtype, mode="r", shape=(index.tokens,))
    for begin, end in pairwise(ends):
        yield ids[begin:end]


def id_range(prefix: str, index: Index, *, blocks: int = 64, block_tokens: int = 65536) -> tuple[int, int]:
    """Lowest and highest id in ``blocks`` evenly spaced stretches of the .bin, or in all of a short one."""
    tokens = index.tokens
    ids = np.memmap(bin_path(prefix), dtype=index.dtype, mode="r", shape=(tokens,))
    if tokens <= blocks * block_tokens:
        return int(ids.min()), int(ids.max())
    starts = np.linspace(0, tokens - block_tokens, blocks).astype(np.int64)
    looked_at = [ids[start : start + block_tokens] for start in starts]
    return min(int(part.min()) for part in looked_at), max(int(part.max()) for part in looked_at)


def _read_header(index: Path) -> tuple[np.dtype, int, int]:
    """dtype, number of sequences, number of document entries; the size of the file fits them."""
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
    size = index.stat().st_size
    if len(header) < _HEADER.size:
        raise _corrupt(index, rule=f"have a header of {_HEADER.size} bytes", value=f"{size} bytes")
    magic, version, code, sequences, entries = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise _corrupt(index, rule=f"begin with {_MAGIC!r}", value=repr(magic))
    if version != _VERSION:
        raise _corrupt(index, rule=f"be of version {_VERSION}", value=str(version))
    if code not in _DTYPES:
        raise _corrupt(index, rule=f"have a dtype code of {sorted(_DTYPES)}", value=str(code))
    expected = _HEADER.size + 12 * sequences + 8 * entries
    if size != expected:
        raise _corrupt(
            index,
            rule=f"have {expected} bytes for {sequences} sequences and {entries} document entries",
            value=f"{size} bytes",
        )
    return np.dtype(_DTYPES[code]), sequences, entries


def _check_offsets(index: Path, *, lengths: np.ndarray, offsets: np.ndarray, dtype: np.dtype) -> None:
    """Every sequence begins where the one before it ended."""
    end = 0
    for block in _blocks(len(lengths)):
        if int(lengths[block].min()) < 0:
            raise _corrupt(index, rule="have no negative length", value=str(int(lengths[block].min())))
        expected = np.zeros(block.stop - block.start + 1, dtype=np.int64)
        np.cumsum(lengths[block], dtype=np.int64, out=expected[1:])
        expected = end + expected * dtype.itemsize
        wrong = np.flatnonzero(expected[:-1] != offsets[block])
        if len(wrong):
            first = block.start + int(wrong[0])
            raise _corrupt(
                index,
                rule=f"place sequence {first} at byte {expected[wrong[0]]} after the one before it",
                value=f"byte {offsets[first]}",
            )
        end = int(expected[-1])


def _check_documents(index: Path, *, starts: np.ndarray, sequences: int) -> None:
    """Documents cover all sequences, in order."""
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != sequences:
        ends = f"{starts[0]} and {starts[-1]}" if len(starts) else "no entry"
        raise _corrupt(index, rule=f"have documents from sequence 0 to {sequences}", value=ends)
    for block in _blocks(len(starts)):
        part = starts[block.start : block.stop + 1]  # one more: the step between blocks counts too
        if (part[1:] < part[:-1]).any():  # not their difference, which may not fit 64 bits
            raise _corrupt(
                index,
                rule="have documents in ascending order",
                value="a document that begins before the last",
            )


def _blocks(total: int) -> Iterator[slice]:
    for start in range(0, total, _BLOCK):
        yield slice(start, min(start + _BLOCK, total))


def _corrupt(index: Path, *, rule: str, value: str) -> ValueError:
    return ValueError(
        f"{index} is corrupt: it must {rule}, got {value}; prepare it again with tools/preprocess_data.py"
    )
