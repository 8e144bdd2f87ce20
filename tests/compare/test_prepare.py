"""One process prepares every data set of a comparison as tools/preprocess_data.py would."""

from pathlib import Path

import pytest

from megatron_sat.compare import prepare
from tools import preprocess_data

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"
POETRY, TECHNOLOGY = DATA / "zh" / "poetry.dev.jsonl.xz", DATA / "en" / "technology.dev.jsonl.xz"
TOKENIZER = DATA / "tokenizer.model"


def test_data_sets_are_those_of_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tokenizer", str(TOKENIZER), "--output", str(tmp_path / "new")]
    prepare.main([*arguments, f"both={POETRY}", f"both={TECHNOLOGY}", f"zh={POETRY}"])
    assert "/both: " in capsys.readouterr().out
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(TOKENIZER), "--append-eod"]
    for name, files in {"both": [POETRY, TECHNOLOGY], "zh": [POETRY]}.items():
        preprocess_data.main(["--input", *map(str, files), "--output-prefix", str(tmp_path / name), *flags])
        for ending in (".bin", ".idx"):
            expected = (tmp_path / f"{name}_text_document{ending}").read_bytes()
            assert (tmp_path / "new" / (name + ending)).read_bytes() == expected


@pytest.mark.parametrize("pair", ["zh.jsonl", "=zh.jsonl", "zh="])
def test_text_without_a_name_is_refused(pair: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"text must be given as NAME=FILE, got {pair}"):
        prepare.main(["--tokenizer", str(TOKENIZER), "--output", str(tmp_path), pair])
