"""tools/extend_vocab.py as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sat.vocab.form import sentencepiece_form
from megatron_sat.vocab.job import _chinese
from megatron_sat.vocab.loss import loss_per_character
from megatron_sat.vocab.source import read_source
from tests.vocab.conftest import DATA, SHIPPED
from tests.vocab.models import load_by_hand, tiny_llama
from tools import extend_vocab

ROOT = Path(__file__).parents[2]
TEXT = str(DATA / "zh" / "poetry.train.jsonl.xz")
HELD_OUT = [str(DATA / "zh" / "poetry.dev.jsonl.xz"), str(DATA / "en" / "technology.dev.jsonl.xz")]


def arguments(output: Path, *more: str) -> list[str]:
    needed = ["--tokenizer", str(SHIPPED), "--text", TEXT, "--add", "400", "--character-coverage", "0.8"]
    return [*needed, "--output", str(output), *more]


def test_one_command_leaves_one_folder_that_loads(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "old", rows=4096)
    more = [
        "--held-out",
        *HELD_OUT,
        "--model",
        str(model),
        "--loss-characters",
        "1500",
        "--tensor-model-parallel-size",
        "2",
    ]
    command = [sys.executable, str(ROOT / "tools" / "extend_vocab.py"), *arguments(tmp_path / "new", *more)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for said in ("proofs", "tokens a character", "zh/poetry", "en/technology", "wrote"):
        assert said in done.stdout
    report = json.loads((tmp_path / "new" / "vocabulary_extension.json").read_text())
    assert [found["domain"] for found in report["tokens_per_character"]] == ["zh/poetry", "en/technology"]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["vocab_size"] == 4608
    texts = _chinese(
        {"zh": [text for _, text in extend_vocab.texts_of([Path(HELD_OUT[0])], key="text")]}, characters=1500
    )
    for when, folder in (("before", model), ("after", tmp_path / "new")):
        proto = read_source(SHIPPED if when == "before" else folder).proto
        assert proto is not None
        encode = sentencepiece_form(proto).encode
        expected = loss_per_character(load_by_hand(folder), encode=encode, start=1, texts=texts)
        assert report["loss_per_character"][when] == pytest.approx(expected, rel=1e-5)


def test_without_held_out_text_a_part_of_the_text_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extend_vocab.main(arguments(tmp_path / "out"))
    said = capsys.readouterr().out
    assert "no --model was given: the tokenizer alone is extended" in said
    report = json.loads((tmp_path / "out" / "vocabulary_extension.json").read_text())
    texts = [text for _, text in extend_vocab.texts_of([Path(TEXT)], key="text")]
    (found,) = report["tokens_per_character"]
    assert found["characters"] == sum(map(len, texts[:: extend_vocab.HOLD_OUT_EVERY]))


def test_records_say_their_domain_or_else_their_file(tmp_path: Path) -> None:
    path = tmp_path / "news.part.jsonl"
    path.write_text('{"text": "a", "lang": "zh", "domain": "law"}\n\n{"text": "b"}\n')
    assert list(extend_vocab.texts_of([path], key="text")) == [("zh/law", "a"), ("news", "b")]


@pytest.mark.parametrize("line", ["not json", '{"body": "a"}', "[1]"])
def test_a_record_without_text_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match="a.jsonl:2 must be a JSON object with the field 'text'"):
        list(extend_vocab.texts_of([path], key="text"))


def test_a_mistake_ends_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "extend_vocab.py"), *arguments(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("extend_vocab.py: --output must not exist yet")


def test_an_interrupted_run_leaves_nothing_of_that_name(tmp_path: Path) -> None:
    """Killed while it writes: the next run cleans up and succeeds."""
    hook = "import os, megatron_sat.vocab.job as j; j._check_as_loaded = lambda *a, **k: os.kill(os.getpid(), 9)"
    code = f"{hook}; from tools.extend_vocab import main; import sys; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments(tmp_path / "out")]
    killed = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    extend_vocab.main(arguments(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
