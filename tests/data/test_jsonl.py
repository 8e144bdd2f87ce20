"""Lines of compressed and damaged files."""

import gzip
import hashlib
import itertools
import lzma
from pathlib import Path

import pytest
import zstandard

from megatron_sat.data import jsonl
from megatron_sat.data.jsonl import Lines, describe, find_inputs

CONTENT = "".join(f"line {i} 第{i}行 {'x' * (i % 97)}\n" for i in range(3000)).encode()


def pack(content: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return zstandard.ZstdCompressor().compress(content)
    return {".gz": gzip.compress, ".xz": lzma.compress, "": bytes}[suffix](content)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("read", [7, 1 << 17])
def test_lines_are_those_of_the_text(tmp_path, monkeypatch, suffix, read):
    monkeypatch.setattr(jsonl, "_READ", read)
    content = CONTENT if read > 7 else CONTENT[:5000]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(content, suffix))
    assert list(Lines(path)) == content.rstrip(b"\n").split(b"\n")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_files_of_several_members_are_read_to_the_end(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(b"one\ntw", suffix) + pack(b"o\nthree", suffix))
    assert list(Lines(path)) == [b"one", b"two", b"three"]


def test_line_ends_of_other_systems_and_a_missing_last_one_do_not_matter(tmp_path):
    (tmp_path / "a").write_bytes(b"one\r\n\r\ntwo")
    assert list(Lines(tmp_path / "a")) == [b"one", b"", b"two"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_file_is_refused_after_the_lines_that_are_whole(tmp_path, suffix, keep):
    packed = pack(CONTENT, suffix)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(packed[: int(len(packed) * keep)])
    with pytest.raises(
        ValueError, match=rf"a\{suffix} must be a whole \{suffix} file, it is damaged after line \d+"
    ):
        list(Lines(path))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_file_of_another_kind_is_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(CONTENT)
    with pytest.raises(ValueError, match="damaged after line 0"):
        list(Lines(path))


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_bytes_read_add_up_to_the_size_on_disk(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(CONTENT, suffix))
    lines = Lines(path)
    told = [lines.newly_read() for _ in itertools.chain(lines, [None])]
    assert sum(told) == path.stat().st_size


def test_a_source_is_described_by_its_bytes_on_disk(tmp_path):
    (tmp_path / "a").write_bytes(CONTENT)
    told: list[int] = []
    source = describe(tmp_path / "a", advance=told.append)
    assert (source.bytes, source.sha256) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert sum(told) == len(CONTENT)


def test_globs_are_sorted_and_paths_keep_their_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "z.txt"):
        (tmp_path / name).touch()
    found = find_inputs([str(tmp_path / "z.txt"), str(tmp_path / "*.jsonl")])
    assert [path.name for path in found] == ["z.txt", "a.jsonl", "b.jsonl"]


def test_a_name_with_brackets_is_a_name_where_the_file_exists(tmp_path):
    (tmp_path / "a[1].jsonl").touch()
    assert find_inputs([str(tmp_path / "a[1].jsonl")]) == [tmp_path / "a[1].jsonl"]


def test_inputs_that_cannot_be_meant_are_refused(tmp_path):
    (tmp_path / "a.jsonl").touch()
    here = str(tmp_path)
    for patterns, message in (
        ([f"{here}/*.gz"], r"must name existing files, .*\*.gz matches none"),
        ([], "must name at least one file, got none"),
        ([here], r"must name files, .* is a folder; write '.*/\*.jsonl'"),
        ([f"{here}/a.jsonl", f"{here}/*"], "must name a file once, .*a.jsonl is named 2 times"),
    ):
        with pytest.raises(ValueError, match=message):
            find_inputs(patterns)
    with pytest.raises(ValueError, match="^--data must name existing files"):
        find_inputs([f"{here}/*.gz"], said="--data")


def test_compression_goes_by_the_name(tmp_path):
    Path(tmp_path / "a.jsonl").write_bytes(pack(CONTENT, ".gz"))
    assert next(iter(Lines(tmp_path / "a.jsonl"))).startswith(b"\x1f\x8b")
