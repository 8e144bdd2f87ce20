"""Which files are the text of a trip."""

from pathlib import Path

import pytest

from megatron_sat.trip.text import find_text


def _files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


WHOLE = (
    "zh/law.train.jsonl.xz",
    "zh/law.dev.jsonl",
    "en/law.train.jsonl.gz",
    "en/law.dev.jsonl.zst",
    "en/tokenizer.model",
)


def test_files_are_found_by_language_split_and_domain(tmp_path: Path) -> None:
    text = find_text(_files(tmp_path, *WHOLE, "zh/a.b.train.jsonl"))
    assert list(text.files["zh", "train"]) == ["a.b", "law"]
    assert text.every("dev") == {"zh/law": tmp_path / "zh/law.dev.jsonl", "en/law": tmp_path / "en/law.dev.jsonl.zst"}


@pytest.mark.parametrize("left_out", WHOLE[:4])
def test_a_language_without_text_of_a_split_is_refused(left_out: str, tmp_path: Path) -> None:
    _files(tmp_path, *(name for name in WHOLE if name != left_out))
    language, split = left_out[:2], left_out.split(".")[1]
    with pytest.raises(ValueError, match=rf"--data must have {language}/DOMAIN\.{split}\.jsonl .*has none"):
        find_text(tmp_path)
