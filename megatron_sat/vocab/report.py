"""What an extended vocabulary says of itself, for those who train it: a file beside the tokenizer."""

import json
from pathlib import Path

REPORT = "vocabulary_extension.json"
"""Written by `job.extend_vocabulary`, kept by an import."""


def first_new_token(tokenizer: Path) -> int:
    """The first id that an extension added. tokenizer: its folder, or a file in there.

    Raises ValueError where no readable report lies beside it.
    """
    path = (tokenizer if tokenizer.is_dir() else tokenizer.parent) / REPORT
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["old_tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must say which tokens are new, it does not ({error.__class__.__name__}: {error}); extend the "
            "vocabulary with tools/extend_vocab.py, or name the first new token with --train-only-first-id"
        ) from error
