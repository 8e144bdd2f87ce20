"""Malformed input of every reader: an error that says so, or what is really there. Never a crash, a hang, or less than
the file holds.

Each check takes bytes that hypothesis made or damaged. The fast tests look at hundreds of them, the slow one at more
than a hundred thousand.
"""

import gzip
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sat.data import jsonl
from megatron_sat.data.encode import TextOptions, encode_lines
from megatron_sat.data.index_file import documents, id_range, read_index, token_dtype, write_index
from megatron_sat.data.jsonl import Lines
from megatron_sat.data.side_file import SideFile, Source, Totals, read_side_file, side_path, write_side_file
from megatron_sat.data.tokenizer import Tokenizer

FEW, MANY = 150, 27_000
"""Inputs of one check, among the fast tests and among the slow ones: four checks, 108,000 inputs."""

DOCUMENTS = [[5, 6, 7], [1], [], [9, 9, 9, 9], [2, 3]]
TEXT = "".join(f"line {i} 第{i}行\n" for i in range(40)).encode()
PACKED = {
    ".gz": gzip.compress(TEXT),
    ".xz": lzma.compress(TEXT),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress(TEXT),
}
SIDE = SideFile(
    tokenizer="NullTokenizer",
    fingerprint="f" * 64,
    vocab_size=1000,
    eod=999,
    options={"append_eod": True},
    sources=(Source(path="a", bytes=1, sha256="0"),),
    totals=Totals(documents=1, tokens=2, max_token_id=999),
    dtype="uint16",
    bin_bytes=4,
)

Damage = tuple[str, int, bytes]
DAMAGE: st.SearchStrategy[list[Damage]] = st.lists(
    st.tuples(
        st.sampled_from(["write", "insert", "delete", "cut"]),
        st.integers(0, 1 << 16),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def damaged(whole: bytes, damage: list[Damage]) -> bytes:
    """A file that was written over, grew, shrank or was cut somewhere."""
    data = bytearray(whole)
    for kind, where, content in damage:
        at = where % (len(data) + 1)
        if kind == "write":
            data[at : at + len(content)] = content
        elif kind == "insert":
            data[at:at] = content
        elif kind == "delete":
            del data[at : at + len(content)]
        else:
            del data[at:]
    return bytes(data)


def refusal_of(call: Callable[[], object]) -> str:
    """What a reader says; nothing where it reads. Any other exception goes through, and fails the test."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def check_index(folder: Path, where: str, damage: list[Damage]) -> None:
    """A damaged .idx or .bin is refused; what is taken holds exactly what the two files say."""
    prefix = folder / "x"
    dtype = token_dtype(1000)
    np.concatenate([np.array(d, dtype=dtype) for d in DOCUMENTS]).tofile(f"{prefix}.bin")
    write_index(Path(f"{prefix}.idx"), np.array([len(d) for d in DOCUMENTS]), dtype=dtype)
    path = Path(f"{prefix}{where}")
    path.write_bytes(damaged(path.read_bytes(), damage))
    said = refusal_of(lambda: read_index(str(prefix)))
    if said:
        assert str(prefix) in said or "x.idx" in said
        return
    index = read_index(str(prefix))
    held = [ids.tolist() for ids in documents(str(prefix), index)]
    raw = np.fromfile(f"{prefix}.bin", dtype=index.dtype)
    assert [i for ids in held for i in ids] == raw.tolist(), "to the last token"
    assert len(held) == index.documents
    assert id_range(str(prefix), index) == (raw.min(), raw.max())


def check_packed(folder: Path, suffix: str, damage: list[Damage]) -> None:
    """A damaged compressed file is an error, or gives every line. Lines before the error may be wrong ones: a checksum
    comes last, and whoever reads finishes nothing without it."""
    path = folder / f"x{suffix}"
    path.write_bytes(damaged(PACKED[suffix], damage))
    got: list[bytes] = []
    if said := refusal_of(lambda: got.extend(Lines(path))):
        assert str(path) in said
    else:
        assert got == TEXT.splitlines()


RECORD = json.dumps({"text": "12 34", "kind": "a"}).encode()


def check_lines(tokenizer: Tokenizer, lines: list[bytes]) -> None:
    """Each line that is not blank becomes a document or is counted, and without leave the first bad one is the end."""
    records = [line for line in lines if line.strip()]
    lenient = encode_lines(lines, tokenizer=tokenizer, options=TextOptions(skip_malformed=True), dtype=np.dtype("i4"))
    totals = lenient.totals
    assert totals.documents + totals.malformed + totals.empty == len(records)
    assert lenient.lengths.sum() == len(lenient.tokens) == totals.tokens
    strict = encode_lines(lines, tokenizer=tokenizer, options=TextOptions(), dtype=np.dtype("i4"))
    assert (strict.error is not None) == (totals.malformed > 0)


def check_side_file(folder: Path, damage: list[Damage]) -> None:
    prefix = str(folder / "x")
    write_side_file(prefix, SIDE)
    path = side_path(prefix)
    path.write_bytes(damaged(path.read_bytes(), damage))
    if said := refusal_of(lambda: read_side_file(prefix)):
        assert str(path) in said
    else:
        side = read_side_file(prefix)
        assert side is not None and isinstance(side.totals.max_token_id, int) and isinstance(side.bin_bytes, int)


LINES = st.lists(
    st.one_of(
        st.binary(max_size=60),
        DAMAGE.map(lambda damage: damaged(RECORD, damage)),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
            lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.sampled_from(["text", "kind", ""]), inner)),
            max_leaves=6,
        ).map(lambda value: json.dumps(value).encode()),
        st.text().map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    ),
    max_size=6,
).map(lambda lines: [piece for line in lines for piece in line.split(b"\n")])


def fuzz(number: int) -> Callable:
    return settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def run_all(folder: Path, tokenizer: Tokenizer, *, number: int) -> None:
    """So many inputs to each of the four readers."""

    @fuzz(number)
    @given(where=st.sampled_from([".idx", ".idx", ".idx", ".bin"]), damage=DAMAGE)
    def index(where: str, damage: list[Damage]) -> None:
        check_index(folder, where, damage)

    @fuzz(number)
    @given(suffix=st.sampled_from(sorted(PACKED)), damage=DAMAGE)
    def packed(suffix: str, damage: list[Damage]) -> None:
        check_packed(folder, suffix, damage)

    @fuzz(number)
    @given(lines=LINES)
    def lines(lines: list[bytes]) -> None:
        check_lines(tokenizer, lines)

    @fuzz(number)
    @given(damage=DAMAGE)
    def side(damage: list[Damage]) -> None:
        check_side_file(folder, damage)

    for check in (index, packed, lines, side):
        check()


def test_damaged_input_is_refused_or_read_whole(tmp_path: Path, ids: Tokenizer) -> None:
    run_all(tmp_path, ids, number=FEW)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_thousand_damaged_inputs_are_refused_or_read_whole(tmp_path: Path, ids: Tokenizer) -> None:
    run_all(tmp_path, ids, number=MANY)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_an_empty_compressed_file_is_no_text_without_lines(suffix: str, tmp_path: Path) -> None:
    """As an interrupted download leaves one; gzip and zstandard would take it for whole."""
    (tmp_path / f"a{suffix}").touch()
    with pytest.raises(ValueError, match=f"must be a whole {suffix} file, it is damaged after line 0: it is empty"):
        list(Lines(tmp_path / f"a{suffix}"))


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1 << 18)
    content = b"short\n" + b"x" * (1 << 20)
    packed = {
        "": content,
        ".gz": gzip.compress(content),
        ".xz": lzma.compress(content),
        ".zst": zstandard.compress(content),
    }
    path = tmp_path / f"a{suffix}"
    path.write_bytes(packed[suffix])
    lines = iter(Lines(path))
    with pytest.raises(ValueError, match=f"a{suffix}:2 must have at most 262144 bytes before its end of line"):
        list(lines)


def test_the_name_inside_a_compressed_file_is_not_looked_at(tmp_path: Path) -> None:
    """A path in it leads nowhere: nothing is unpacked to a file."""
    folder = tmp_path / "inner"
    folder.mkdir()
    head = b"\x1f\x8b\x08\x08" + struct.pack("<LBB", 0, 0, 255) + b"../../../outside.txt\x00"
    (folder / "a.gz").write_bytes(head + gzip.compress(b"one\ntwo\n")[10:])
    assert list(Lines(folder / "a.gz")) == [b"one", b"two"]
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "a.gz"]


def test_deep_brackets_in_a_side_file_are_refused(tmp_path: Path) -> None:
    side_path(str(tmp_path / "x")).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="must be the side file of a data set, got RecursionError"):
        read_side_file(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bin_bytes": "4"}, "bin_bytes is '4'"),
        ({"totals": {"max_token_id": None}}, "max_token_id is None"),
        ({"options": []}, "options is "),
    ],
)
def test_a_side_file_with_values_of_another_type_is_refused(change: dict, said: str, tmp_path: Path) -> None:
    write_side_file(str(tmp_path / "x"), SIDE)
    path = side_path(str(tmp_path / "x"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        read_side_file(str(tmp_path / "x"))
