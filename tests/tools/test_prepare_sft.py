"""tools/prepare_sft.py as a user calls it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sat.data.side_file import read_side_file
from tools import prepare_sft

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "examples" / "data" / "tokenizer.model")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    records = [{"instruction": "one 一", "output": "ein", "lang": "zh"}, {"prompt": "two", "response": "zwei, drei"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    chosen = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", MODEL, "--workers", "1"]
    return ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "new" / "out"), *chosen]


def test_a_command_writes_a_data_set_and_says_what_is_in_it(tmp_path, arguments):
    command = [sys.executable, str(ROOT / "tools" / "prepare_sft.py"), *arguments, "--template", "alpaca"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.bin", "out.idx", "out.json"]
    side = read_side_file(str(tmp_path / "new" / "out"))
    said = " ".join(done.stdout.split())
    assert f"out: 2 examples, {side.totals.tokens} tokens, {side.totals.targets} of them of responses; 0 trunc" in said
    assert side.options["template"] == "alpaca"


def test_options_reach_the_data_set(tmp_path, arguments, capsys):
    chosen = "--template plain --prepend-bos --keep lang=zh --max-tokens 40 --too-long drop".split()
    prepare_sft.main([*arguments, *chosen])
    side = read_side_file(str(tmp_path / "new" / "out"))
    options = {name: side.options[name] for name in ("keep", "max_tokens", "too_long", "form")}
    assert options == {"keep": {"lang": ["zh"]}, "max_tokens": 40, "too_long": "drop", "form": "auto"}
    assert (side.totals.filtered, side.totals.documents) == (1, 1)
    assert "1 filtered" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--template", "plain", "--format", "messages"], "in.jsonl:1 must be an instruction record, got no list of"),
        (["--template", "plain", "--too-long", "drop"], "--too-long drop has no effect without --max-tokens; leave it"),
        ([], "--template tokenizer needs a Hugging Face tokenizer, got sentencepiece"),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, monkeypatch, more, said):
    monkeypatch.setattr(sys, "argv", ["prepare_sft.py", *arguments, *more])
    with pytest.raises(SystemExit, match=f"^prepare_sft.py: .*{said}.*$"):
        runpy.run_path(str(ROOT / "tools" / "prepare_sft.py"), run_name="__main__")
