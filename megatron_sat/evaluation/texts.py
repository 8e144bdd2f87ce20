"""The documents of each domain, from jsonl or from prepared data: their ids, and how long the text behind these is.

Both give the same: special tokens are no text. In prepared data an end-of-document token ends a document wherever it
stands, a bos in front goes, and neither is scored; a document without tokens is none. Characters and bytes of prepared
data are those that preparing counted, or, where only a part is read or nobody counted, those of the decoded ids.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from megatron_sat.data.encode import TextOptions, encode_lines
from megatron_sat.data.index_file import bin_path, documents, id_range, idx_path, read_index
from megatron_sat.data.jsonl import Lines, find_inputs
from megatron_sat.data.side_file import Totals, read_side_file
from megatron_sat.data.tokenizer import Tokenizer

FLAG = "--data"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a domain is read, from its beginning: whole documents until one of these is reached."""

    documents: int | None = None
    """At least 1; None: all."""
    characters: int | None = None
    """At least 1; None: all."""

    def __post_init__(self) -> None:
        for name, value in (("--max-documents", self.documents), ("--max-characters", self.characters)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; leave it out to read everything")

    def reached(self, *, documents: int, characters: int) -> bool:
        """Whether so much is enough."""
        enough = self.documents is not None and documents >= self.documents
        return enough or (self.characters is not None and characters >= self.characters)


@dataclass(kw_only=True)
class Texts:
    """What is scored of a domain."""

    documents: list[np.ndarray] = field(default_factory=list)
    """Ids of each, at least one, none of them special."""
    characters: int = 0
    bytes: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.documents)


@dataclass(frozen=True, kw_only=True)
class _Document:
    ids: np.ndarray
    characters: int
    bytes: int


def parse_data(values: Sequence[str]) -> dict[str, list[str]]:
    """Domain to paths, from NAME=PATH. Raises ValueError for what is not written so, and for a path named twice."""
    data: dict[str, list[str]] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (equals and path and _NAME.fullmatch(name)):
            raise ValueError(f"{FLAG} must be NAME=PATH, got {value!r}; write for example zh/poetry=poetry.dev.jsonl")
        if path in data.setdefault(name, []):
            raise ValueError(f"{FLAG} must name a path once a domain, {path} is named twice for {name}; drop one")
        data[name].append(path)
    return data


def read_texts(
    data: Mapping[str, Sequence[str]], *, tokenizer: Tokenizer, key: str, limits: Limits
) -> dict[str, Texts]:
    """The documents of all domains, in memory. key: the field of a jsonl record that holds its text.

    Raises ValueError for paths that are missing or cannot be read, data of another tokenizer, a domain without text.
    """
    found = {}
    for name, paths in data.items():
        found[name] = _read_domain(name, paths, tokenizer=tokenizer, key=key, limits=limits)
        if not found[name].characters:
            raise ValueError(
                f"{FLAG}: a domain must have a document with text, {name} has none in {', '.join(paths)}; leave it out"
            )
    return found


def _read_domain(name: str, paths: Sequence[str], *, tokenizer: Tokenizer, key: str, limits: Limits) -> Texts:
    texts = Texts()
    for path in paths:
        before = (texts.characters, texts.bytes)
        prepared = idx_path(path).exists() or bin_path(path).exists()
        counted = None
        if prepared:
            counted = _check_prepared(name, path, tokenizer=tokenizer)
            arriving = _prepared(path, tokenizer=tokenizer)
        else:
            arriving = _jsonl(name, path, tokenizer=tokenizer, key=key)
        for document in arriving:
            texts.documents.append(document.ids)
            texts.characters += document.characters
            texts.bytes += document.bytes
            if limits.reached(documents=len(texts.documents), characters=texts.characters):
                return texts
        if counted is not None:
            texts.characters, texts.bytes = before[0] + counted.characters, before[1] + counted.bytes
    return texts


def _jsonl(name: str, path: str, *, tokenizer: Tokenizer, key: str) -> Iterator[_Document]:
    options = TextOptions(key=key)
    try:
        files = find_inputs([path], said=FLAG)
    except ValueError as error:
        raise ValueError(f"{error} (domain {name}; nor is there prepared data, {idx_path(path)})") from error
    for file in files:
        for number, line in enumerate(Lines(file), start=1):
            read = encode_lines([line], tokenizer=tokenizer, options=options, dtype=np.dtype("<i8"))
            if read.error is not None:
                raise ValueError(
                    f"{file}:{number} must be a JSON object with text in {key!r}, it has {read.error[1]}; set "
                    f"--json-key (domain {name})"
                )
            if len(read.tokens):
                yield _Document(ids=read.tokens, characters=read.totals.characters, bytes=read.totals.bytes)


def _check_prepared(name: str, path: str, *, tokenizer: Tokenizer) -> Totals | None:
    """What preparing counted; None where Megatron-LM's own tool prepared. Raises ValueError for another tokenizer."""
    way_out = "prepare it with this model's tokenizer, or give the jsonl"
    side = read_side_file(path)
    if side is not None and side.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{FLAG}: prepared data must be of the model's tokenizer ({tokenizer.fingerprint[:12]}), {path} of {name} "
            f"is of another ({side.fingerprint[:12]}); {way_out}"
        )
    highest = id_range(path, read_index(path))[1]
    if highest >= tokenizer.vocab_size:
        raise ValueError(
            f"{FLAG}: prepared data must have ids below the tokenizer's {tokenizer.vocab_size}, {path} of {name} has "
            f"{highest}; {way_out}"
        )
    return None if side is None else side.totals


def _prepared(path: str, *, tokenizer: Tokenizer) -> Iterator[_Document]:
    for stored in documents(path, read_index(path)):
        for ids in _without_special(stored.astype(np.int64), tokenizer=tokenizer):
            text = tokenizer.detokenize(ids.tolist())
            yield _Document(ids=ids, characters=len(text), bytes=len(text.encode()))


def _without_special(stored: np.ndarray, *, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    ends = np.flatnonzero(stored == tokenizer.eod)
    for begin, end in pairwise([-1, *ends.tolist(), len(stored)]):
        ids = stored[begin + 1 : end]
        if len(ids) and ids[0] == tokenizer.bos:
            ids = ids[1:]
        if len(ids):
            yield ids
