"""Which tokens are new, as the file beside the tokenizer says."""

import json
from pathlib import Path

import pytest

from megatron_sat.vocab.report import REPORT, first_new_token


def test_the_first_new_token_is_read_beside_a_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(json.dumps({"old_tokens": 4096}))
    assert first_new_token(tmp_path) == first_new_token(tmp_path / "tokenizer.model") == 4096


@pytest.mark.parametrize("text", [None, "{", "{}", "[]", '{"old_tokens": "many"}'])
def test_a_tokenizer_that_does_not_say_it_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / REPORT).write_text(text)
    with pytest.raises(ValueError, match="must say which tokens are new, it does not .* --train-only-first-id"):
        first_new_token(tmp_path)
