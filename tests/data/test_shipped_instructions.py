"""examples/data/sft: free, small, made by its script, and no law in both splits."""

import importlib.util
import json
import lzma
from pathlib import Path
from types import ModuleType

from megatron_sat.data.sft_records import read_conversation
from tests.data.conftest import EXCERPT


def records(split: str, folder: Path = EXCERPT) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "sft" / f"law.{split}.jsonl").read_text().splitlines()]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_instructions", EXCERPT / "make_instructions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_record_is_a_conversation_of_a_source_with_a_licence():
    documented = (EXCERPT / "SOURCES.md").read_text()
    for split, number in script().NUMBER.items():
        assert len(records(split)) == number
        for record in records(split):
            assert read_conversation(record, form="auto").exchanges[0].response
            assert f"| {record['source']} |" in documented


def test_the_splits_are_what_the_script_makes_of_them(tmp_path, capsys):
    make = script()
    together = records("train") + records("dev")
    other = {"instruction": "x", "input": "", "output": "y", "source": "other"}
    packed = lzma.compress("".join(json.dumps(record) + "\n" for record in [*together, other]).encode())
    (tmp_path / "all.jsonl.xz").write_bytes(packed)
    make.main(tmp_path / "all.jsonl.xz", tmp_path)
    for split in make.NUMBER:
        assert records(split, tmp_path) == records(split)
        assert {make.split_of(record) for record in records(split)} == {split}
