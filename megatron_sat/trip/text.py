"""The text of a trip: FOLDER/{zh,en}/DOMAIN.{train,dev}.jsonl, plain or compressed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NEW, OLD = "zh", "en"
"""The language that is learnt, and the one that must not be forgotten."""
LANGUAGES = (NEW, OLD)
SPLITS = ("train", "dev")
_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")


@dataclass(frozen=True, kw_only=True)
class Text:
    """Where the files are."""

    files: Mapping[tuple[str, str], Mapping[str, Path]]
    """By language and split, then by domain, in order."""

    def every(self, split: str) -> dict[str, Path]:
        """The files of a split, named LANGUAGE/DOMAIN."""
        return {
            f"{language}/{domain}": path
            for language in LANGUAGES
            for domain, path in self.files[language, split].items()
        }


def find_text(folder: Path) -> Text:
    """The files of a folder. Raises ValueError where a language lacks text to train on or to evaluate with."""
    files = {(language, split): _domains(folder, language, split) for language in LANGUAGES for split in SPLITS}
    for (language, split), found in files.items():
        if not found:
            raise ValueError(
                f"--data must have {language}/DOMAIN.{split}.jsonl (or .gz, .xz, .zst), {folder} has none; "
                "name another folder, or put the files there"
            )
    return Text(files=files)


def _domains(folder: Path, language: str, split: str) -> dict[str, Path]:
    endings = [f".{split}{ending}" for ending in _ENDINGS]
    found = sorted((folder / language).glob(f"*.{split}.jsonl*"))
    return {path.name.removesuffix(ending): path for path in found for ending in endings if path.name.endswith(ending)}
