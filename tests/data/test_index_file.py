"""The .idx format against megatron.core's own reader and writer, and every way to break it."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_sat.data import index_file
from megatron_sat.data.index_file import documents, id_range, read_index, token_dtype, write_index

U2 = token_dtype(1000)
DOCUMENTS = [[5, 6, 7], [1], [9, 9, 9, 9], [2, 3]]


def write(prefix: Path, documents: list[list[int]], dtype: np.dtype = U2) -> str:
    np.concatenate([np.array(d, dtype=dtype) for d in documents]).tofile(f"{prefix}.bin")
    write_index(Path(f"{prefix}.idx"), np.array([len(d) for d in documents]), dtype=dtype)
    return str(prefix)


@pytest.mark.parametrize("vocab_size", [1000, 65499, 65500, 200_000])
def test_files_are_megatrons_byte_for_byte(tmp_path, vocab_size):
    dtype = token_dtype(vocab_size)
    assert dtype == DType.optimal_dtype(vocab_size)
    ours = write(tmp_path / "ours", DOCUMENTS, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert Path(ours + ending).read_bytes() == (tmp_path / "theirs").with_suffix(ending).read_bytes()


def test_megatrons_files_are_read(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for sentences in ([[1, 2], [3]], [[4, 5, 6]]):
        flat = [i for sentence in sentences for i in sentence]
        builder.add_document(torch.tensor(flat), [len(sentence) for sentence in sentences])
    builder.finalize(str(tmp_path / "theirs.idx"))
    index = read_index(str(tmp_path / "theirs"))
    assert (index.lengths.tolist(), index.documents, index.tokens, index.dtype) == ([2, 1, 3], 2, 6, np.int32)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_checks_across_blocks_accept_a_whole_file(tmp_path, monkeypatch, block):
    monkeypatch.setattr(index_file, "_BLOCK", block)
    assert read_index(write(tmp_path / "x", DOCUMENTS)).tokens == 10


@pytest.mark.parametrize("there", [".bin", ".idx"])
def test_one_file_without_the_other_is_refused(tmp_path, there):
    prefix = write(tmp_path / "x", DOCUMENTS)
    missing = ".idx" if there == ".bin" else ".bin"
    Path(prefix + missing).unlink()
    with pytest.raises(ValueError, match=rf"x\{missing} does not exist, though x\{there} is there"):
        read_index(prefix)


def test_a_prefix_without_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.bin does not exist, nor the other; check the path"):
        read_index(str(tmp_path / "x"))


def test_a_data_set_without_tokens_is_refused(tmp_path):
    for name, lengths in (("none", []), ("empty", [0, 0])):
        (tmp_path / f"{name}.bin").touch()
        write_index(tmp_path / f"{name}.idx", np.array(lengths, dtype=np.int32), dtype=token_dtype(9))
        with pytest.raises(ValueError, match=f"a data set must hold tokens, .*{name} has none"):
            read_index(str(tmp_path / name))


@pytest.mark.parametrize(
    "offset, content, message",
    [
        (0, b"NOTMMIDID", "begin with b'MMIDIDX"),
        (9, struct.pack("<Q", 2), "be of version 1, got 2"),
        (17, b"\x07", "have a dtype code of .*, got 7"),
        (18, struct.pack("<Q", 3), "have 110 bytes for 3 sequences and 5 document entries, got 122 bytes"),
        (34, struct.pack("<i", -3), "have no negative length, got -3"),
        (34, struct.pack("<i", 4), "place sequence 1 at byte 8 after the one before it, got byte 6"),
        (34 + 12, struct.pack("<i", 3), "describe x.bin to its end, got 22 bytes described, 20 found"),
        (34 + 16 + 8, struct.pack("<q", 7), "place sequence 1 at byte 6 after the one before it, got byte 7"),
        (34 + 48, struct.pack("<q", 1), "have documents from sequence 0 to 4, got 1 and 4"),
        (34 + 48 + 32, struct.pack("<q", 9), "have documents from sequence 0 to 4, got 0 and 9"),
        (34 + 48 + 8, struct.pack("<q", 3), "have documents in ascending order"),
        # apart by more than 64 bits hold
        (34 + 48 + 8, struct.pack("<qq", 3 + 2**56, -(127 * 2**56)), "have documents in ascending order"),
    ],
)
def test_a_changed_idx_is_refused_with_the_rule_it_breaks(tmp_path, offset, content, message):
    prefix = write(tmp_path / "x", DOCUMENTS)
    with Path(prefix + ".idx").open("r+b") as file:
        file.seek(offset)
        file.write(content)
    with pytest.raises(ValueError, match=f"x.idx is corrupt: it must {message}"):
        read_index(prefix)


@pytest.mark.parametrize(
    "size, message", [(20, "have a header of 34 bytes, got 20 bytes"), (100, "have 122 bytes")]
)
def test_a_truncated_idx_is_refused(tmp_path, size, message):
    prefix = write(tmp_path / "x", DOCUMENTS)
    with Path(prefix + ".idx").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=message):
        read_index(prefix)


@pytest.mark.parametrize("change", [-2, 2])
def test_a_bin_of_another_length_is_refused(tmp_path, change):
    prefix = write(tmp_path / "x", DOCUMENTS)
    with Path(prefix + ".bin").open("r+b") as file:
        file.truncate(20 + change)
    with pytest.raises(ValueError, match=f"20 bytes described, {20 + change} found"):
        read_index(prefix)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    prefix = write(folder / "x", DOCUMENTS)
    whole = bytearray(Path(prefix + ".idx").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(whole)] * 3 + list(range(len(whole)))))
    Path(prefix + ".idx").write_bytes(bytes(whole[:cut]))
    refusal = ""
    try:
        read_index(prefix)
    except ValueError as error:
        refusal = str(error)
    opened = None if refusal else IndexedDataset(prefix)
    harmless = opened is not None and [opened[i].tolist() for i in range(len(opened))] == DOCUMENTS
    assert harmless or "x.idx is corrupt" in refusal
    shutil.rmtree(folder)


def test_documents_are_read_one_by_one_and_empty_ones_too(tmp_path):
    prefix = write(tmp_path / "x", [[1, 2], [], [3], []])
    assert [ids.tolist() for ids in documents(prefix, read_index(prefix))] == [[1, 2], [], [3], []]


def test_sequences_of_one_document_are_put_together(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    for sequences in ([[1, 2], [3]], [[4], [5, 6], [7]]):
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "x.idx"))
    prefix = str(tmp_path / "x")
    assert [ids.tolist() for ids in documents(prefix, read_index(prefix))] == [[1, 2, 3], [4, 5, 6, 7]]


def test_id_range_sees_every_id_of_a_small_file(tmp_path):
    prefix = write(tmp_path / "x", DOCUMENTS)
    assert id_range(prefix, read_index(prefix)) == (1, 9)


def test_id_range_looks_at_the_beginning_and_the_end_of_a_large_file(tmp_path):
    prefix = write(tmp_path / "x", [[1], [5] * 500, [9]])
    assert id_range(prefix, read_index(prefix), blocks=4, block_tokens=10) == (1, 9)
