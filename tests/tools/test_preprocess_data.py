"""tools/preprocess_data.py as a user calls it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from tools import preprocess_data

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "examples" / "data" / "tokenizer.model")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    records = [{"text": "one 一", "title": "t1", "lang": "zh"}, {"text": "two", "title": "t2", "lang": "en"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    chosen = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", MODEL, "--workers", "1"]
    return ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "new" / "out"), *chosen]


def test_megatrons_command_line_gives_megatrons_files(tmp_path, arguments):
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *arguments, "--append-eod"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        f"out_text_document{ending}" for ending in (".bin", ".idx", ".json")
    ]
    assert "out_text_document: 2 documents" in done.stdout
    opened = IndexedDataset(str(tmp_path / "new" / "out_text_document"))
    assert (len(opened), opened[1][-1]) == (2, 2)


def test_a_mistake_ends_in_one_line(tmp_path, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *arguments, "--json-keys", "body"])
    mistake = f"^preprocess_data.py: {tmp_path}/in.jsonl:1 must be a JSON object with a text, got no field.*$"
    with pytest.raises(SystemExit, match=mistake):
        runpy.run_path(str(ROOT / "tools" / "preprocess_data.py"), run_name="__main__")


def test_each_key_is_a_data_set(tmp_path, arguments):
    preprocess_data.main([*arguments, "--json-keys", "text", "title", "--append-eod"])
    for key in ("text", "title"):
        opened = IndexedDataset(str(tmp_path / "new" / f"out_{key}_document"))
        assert len(opened) == 2


def test_records_are_chosen_by_field(tmp_path, arguments, capsys):
    preprocess_data.main([*arguments, "--keep", "lang=zh", "--keep", "lang=fr", "--append-eod"])
    assert "1 documents" in capsys.readouterr().out
    side = json.loads((tmp_path / "new" / "out_text_document.json").read_text())
    assert (side["options"]["keep"], side["totals"]["filtered"]) == ({"lang": ["zh", "fr"]}, 1)


@pytest.mark.parametrize("pair", ["lang", "=zh"])
def test_a_condition_without_field_or_value_is_refused(arguments, pair):
    with pytest.raises(
        ValueError, match=f"--drop must be FIELD=VALUE, got {pair}; write for instance --drop lang=zh"
    ):
        preprocess_data.main([*arguments, "--drop", pair])


def test_flags_of_megatrons_that_are_not_needed_say_so(arguments, capsys):
    preprocess_data.main([*arguments, "--partitions", "4", "--keep-sequential-samples"])
    said = capsys.readouterr().out
    assert "--partitions has no effect" in said
    assert "--keep-sequential-samples has no effect" in said
    assert "--append-eod separates them" in said


def test_an_unknown_flag_is_refused_by_name(arguments, capsys):
    with pytest.raises(SystemExit):
        preprocess_data.main([*arguments, "--split-sentences"])
    assert "unrecognized arguments: --split-sentences" in capsys.readouterr().err
