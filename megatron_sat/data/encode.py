"""Lines of jsonl to token ids, in this process or in several, always in the order of the lines.

Workers are forked: they inherit the tokenizer instead of loading it again. Fork before threads are started (a
progress bar has one) and where no CUDA context exists.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from megatron_sat.data.side_file import Totals
from megatron_sat.data.tokenizer import NO_TOKEN, Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which texts become documents, and how: all that decides the output besides input and tokenizer."""

    key: str = "text"
    """Field of a record that holds its text."""
    append_eod: bool = False
    """End each document with the tokenizer's end-of-document id."""
    prepend_bos: bool = False
    """Begin each document with the tokenizer's bos id, as Llama's own data did."""
    keep: Mapping[str, list[str]] = field(default_factory=dict)
    """Keep only records whose field has one of these values; all fields must agree."""
    drop: Mapping[str, list[str]] = field(default_factory=dict)
    """Leave out records of which any of these fields has one of these values."""
    skip_malformed: bool = False
    """Count lines that cannot be read instead of ending with the first."""

    def wants(self, record: dict[str, Any]) -> bool:
        """Whether ``keep`` and ``drop`` leave the record in."""
        return wanted(record, keep=self.keep, drop=self.drop)


def conditions(pairs: Sequence[str], *, flag: str) -> dict[str, list[str]]:
    """What ``keep`` and ``drop`` take, out of FIELD=VALUE texts. Raises ValueError for one that is none."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ValueError(f"{flag} must be FIELD=VALUE, got {pair}; write for instance {flag} lang=zh")
        found.setdefault(name, []).append(value)
    return found


def wanted(record: Mapping[str, Any], *, keep: Mapping[str, list[str]], drop: Mapping[str, list[str]]) -> bool:
    """Whether all fields of ``keep`` have one of their values in the record, and no field of ``drop`` has."""
    kept = all(str(record.get(name)) in values for name, values in keep.items())
    return kept and not any(str(record.get(name)) in values for name, values in drop.items())


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What comes of some lines."""

    tokens: np.ndarray
    """[tokens] ids of all documents in a row."""
    lengths: np.ndarray
    """[documents] i32."""
    totals: Totals
    error: tuple[int, str] | None
    """(lines before it, what is wrong) of the first malformed line, where these are not skipped."""


class HasLines(Protocol):
    """Anything that brings lines along; handed back beside what came of them."""

    @property
    def lines(self) -> list[bytes]: ...


Chunk = TypeVar("Chunk", bound=HasLines)


Work = Callable[[Sequence[bytes]], Encoded]
"""What is made of some lines."""


def encode_lines(
    lines: Sequence[bytes], *, tokenizer: Tokenizer, options: TextOptions, dtype: np.dtype
) -> Encoded:
    """Documents of jsonl lines. Blank ones are no records; a malformed one ends the work unless skipped."""
    documents: list[np.ndarray] = []
    totals = Totals()
    error = None
    before = [tokenizer.bos] if options.prepend_bos else []
    after = [tokenizer.eod] if options.append_eod else []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = parse_record(line)
            text, size = _text(record, key=options.key)
            ids = tokenizer.tokenize(text) if options.wants(record) else None
        except ValueError as problem:
            if not options.skip_malformed:
                error = (number, str(problem))
                break
            totals.malformed += 1
            continue
        if not ids:
            totals.add(Totals(filtered=1) if ids is None else Totals(empty=1))
            continue
        documents.append(np.array(before + ids + after, dtype=dtype))
        totals.add(Totals(documents=1, characters=len(text), bytes=size))
    tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=dtype)
    totals.tokens, totals.max_token_id = len(tokens), int(tokens.max(initial=0)) if documents else -1
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    return Encoded(tokens=tokens, lengths=lengths, totals=totals, error=error)


def parse_record(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError that says what is wrong."""
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError("brackets nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"no JSON object but {type(record).__name__}")
    return record


def _text(record: dict[str, Any], *, key: str) -> tuple[str, int]:
    """A record's text and its size in UTF-8. Raises ValueError that says what is wrong."""
    if key not in record:
        raise ValueError(f"no field {key!r}, only {', '.join(sorted(record)) or 'none'}")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"field {key!r} that is no text but {type(text).__name__}")
    return text, len(text.encode())  # a lone surrogate is a UnicodeEncodeError, which is a ValueError


class Encoder:
    """One work over many chunks, ahead and in order; a context manager that owns the processes.

    work: `encode_lines` with all but the lines bound, say. workers: 1 works in this process; more are forked at entry.
    """

    def __init__(self, work: Work, *, workers: int) -> None:
        self._work, self._workers = work, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Encoder":
        if self._workers > 1:
            self._pool = ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("fork"),
                initializer=_start_worker,
                initargs=(os.getpid(), self._work),
            )
            self._pool.submit(os.getpid).result()  # forks all of them now, before the caller starts threads
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Encoded]]:
        """Each chunk with what came of it. Raises RuntimeError when a worker died."""
        if self._pool is None:
            for chunk in chunks:
                yield chunk, self._work(chunk.lines)
            return
        under_way: deque[tuple[Chunk, Future[Encoded]]] = deque()
        try:
            for chunk in chunks:
                under_way.append((chunk, self._pool.submit(_encode_here, chunk.lines)))
                if len(under_way) > 4 * self._workers:  # bounds memory, keeps everyone busy
                    first, future = under_way.popleft()
                    yield first, future.result()
            for first, future in under_way:
                yield first, future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"{self._workers} worker processes must live to the end, one died (killed for memory?); "
                "run again to continue, with fewer --workers"
            ) from error


_inherited: Work


def _start_worker(parent: int, work: Work) -> None:
    """In a worker: keep what was inherited, leave Ctrl-C to the parent, and do not outlive it."""
    global _inherited
    _inherited = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """A worker waits on a pipe that its siblings hold open too: a killed parent would go unnoticed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode_here(lines: list[bytes]) -> Encoded:
    return _inherited(lines)


def check_options(options: TextOptions, *, tokenizer: Tokenizer) -> None:
    """Raises ValueError for options that this tokenizer cannot carry out."""
    if options.prepend_bos and tokenizer.bos == NO_TOKEN:
        raise ValueError(
            "--prepend-bos needs a tokenizer with a bos token, this one has none; leave the flag out"
        )
    refuse_both(options.keep, drop=options.drop)


def refuse_both(keep: Mapping[str, list[str]], *, drop: Mapping[str, list[str]]) -> None:
    """Raises ValueError for a field that is to choose and to leave out."""
    both = set(keep) & set(drop)
    if both:
        raise ValueError(
            f"a field may be in --keep or in --drop, {sorted(both)} are in both; use --keep alone"
        )
