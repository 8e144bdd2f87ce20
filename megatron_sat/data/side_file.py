"""``PREFIX.json`` beside a prepared data set: whose tokens it holds, made from what, and how many.

Written last, so that its presence says that .bin and .idx are whole. Training compares the tokenizer's
fingerprint.
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FORMAT = 1
CONVERSATIONS = "conversations"
"""What `SideFile.options` say under "kind" of instruction data; of documents they say nothing there."""


@dataclass(kw_only=True)
class Totals:
    """What went in and what came out, counted while preparing."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    """Unicode code points of the texts."""
    bytes: int = 0
    """UTF-8 bytes of the texts."""
    malformed: int = 0
    """Lines left out because they could not be read."""
    filtered: int = 0
    """Records left out on request."""
    empty: int = 0
    """Records whose text has no token."""
    targets: int = 0
    """Tokens of responses, in instruction data."""
    truncated: int = 0
    """Examples cut to a length, in instruction data."""
    too_long: int = 0
    """Examples left out for their length, in instruction data."""
    max_token_id: int = -1

    def add(self, other: "Totals") -> None:
        """Count ``other`` in."""
        for each in fields(self):
            if each.name != "max_token_id":
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        self.max_token_id = max(self.max_token_id, other.max_token_id)


@dataclass(frozen=True, kw_only=True)
class Source:
    """An input file as it was read."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SideFile:
    """Content of ``PREFIX.json``."""

    tokenizer: str
    """Kind of the tokenizer."""
    fingerprint: str
    vocab_size: int
    eod: int
    options: dict[str, Any]
    """How texts were chosen and encoded: `encode.TextOptions`, or `sft_encode.ChatOptions`."""
    sources: tuple[Source, ...]
    totals: Totals
    dtype: str
    bin_bytes: int
    format: int = field(default=FORMAT)


def side_path(prefix: str) -> Path:
    """Where the side file of a data set is."""
    return Path(f"{prefix}.json")


def read_side_file(prefix: str) -> SideFile | None:
    """The side file of ``prefix``, or None where there is none (Megatron-LM's own tool writes none).

    Raises ValueError when it is not what `write_side_file` wrote.
    """
    path = side_path(prefix)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        sources = tuple(Source(**source) for source in content.pop("sources"))
        side = SideFile(**content | {"sources": sources, "totals": Totals(**content["totals"])})
        for part in (side, side.totals, *side.sources):
            _check_types(part)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} must be the side file of a data set, got {error!r}; prepare the data again"
        ) from error
    if side.format != FORMAT:
        raise ValueError(
            f"{path} must have format {FORMAT}, got {side.format}; prepare the data with this version"
        )
    return side


def _check_types(part: Any) -> None:
    """Raise TypeError where a number or a text is something else."""
    for each in fields(part):
        value = getattr(part, each.name)
        if each.type in (int, str) and type(value) is not each.type:
            raise TypeError(f"{each.name} is {value!r}")
    if isinstance(part, SideFile) and not isinstance(part.options, dict):
        raise TypeError(f"options is {part.options!r}")


def write_side_file(prefix: str, side: SideFile) -> None:
    """Put the side file in its place, whole or not at all."""
    write_whole(side_path(prefix), json.dumps(asdict(side), indent=1, ensure_ascii=False).encode() + b"\n")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that no crash leaves half of it: a temporary name, to disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force renames in ``folder`` to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
