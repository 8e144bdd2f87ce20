"""The side file comes back as it was written, and is refused where it is something else."""

import json
from dataclasses import replace

import pytest

from megatron_sat.data.side_file import (
    SideFile,
    Source,
    Totals,
    read_side_file,
    side_path,
    write_side_file,
    write_whole,
)

SIDE = SideFile(
    tokenizer="null",
    fingerprint="f" * 64,
    vocab_size=10,
    eod=9,
    options={"key": "text", "keep": {"lang": ["zh"]}},
    sources=(Source(path="文.jsonl", bytes=3, sha256="0" * 64),),
    totals=Totals(documents=2, tokens=5, max_token_id=8),
    dtype="uint16",
    bin_bytes=10,
)


def test_a_side_file_comes_back_as_it_was_written(tmp_path):
    write_side_file(str(tmp_path / "x"), SIDE)
    assert read_side_file(str(tmp_path / "x")) == SIDE


def test_no_side_file_is_none(tmp_path):
    assert read_side_file(str(tmp_path / "x")) is None


@pytest.mark.parametrize("content", ["{broken", "[]", "{}", '{"sources": [], "totals": {}, "more": 1}'])
def test_something_else_is_refused(tmp_path, content):
    side_path(str(tmp_path / "x")).write_text(content)
    with pytest.raises(ValueError, match=r"x.json must be the side file of a data set, got"):
        read_side_file(str(tmp_path / "x"))


def test_another_format_is_refused(tmp_path):
    write_side_file(str(tmp_path / "x"), replace(SIDE, format=99))
    with pytest.raises(ValueError, match=r"x.json must have format 1, got 99"):
        read_side_file(str(tmp_path / "x"))


def test_totals_add_up_and_keep_the_highest_id():
    totals = Totals(
        documents=1, tokens=2, characters=3, bytes=4, malformed=5, filtered=6, empty=7, max_token_id=8
    )
    totals.add(
        Totals(
            documents=10,
            tokens=20,
            characters=30,
            bytes=40,
            malformed=50,
            filtered=60,
            empty=70,
            max_token_id=3,
        )
    )
    assert totals == Totals(
        documents=11, tokens=22, characters=33, bytes=44, malformed=55, filtered=66, empty=77, max_token_id=8
    )


def test_a_whole_file_leaves_no_temporary_one(tmp_path):
    write_whole(tmp_path / "x.json", json.dumps([1]).encode())
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
