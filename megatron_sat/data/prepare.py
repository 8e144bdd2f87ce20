"""Text to a Megatron data set: jsonl files in; .bin, .idx and the side file out.

This room reads lines in order, has them encoded (`encode`) and appends the result to a `draft`, which
survives crashes. The output depends on input, tokenizer and `TextOptions` alone, not on the number of workers
or on interruptions.
"""

import dataclasses
import functools
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sat.data.draft import Draft, Position, draft_folder, read_progress
from megatron_sat.data.encode import Encoder, TextOptions, Work, check_options, encode_lines
from megatron_sat.data.index_file import bin_path, idx_path, token_dtype
from megatron_sat.data.jsonl import Lines, describe, find_inputs
from megatron_sat.data.side_file import SideFile, Source, read_side_file
from megatron_sat.data.tokenizer import Tokenizer
from megatron_sat.log import Advance, progress, say

_CHUNK_LINES = 256
_CHUNK_BYTES = 1 << 20
"""A worker's portion: at most so many lines, and no more once it has so many bytes."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some lines of one input file."""

    source: int
    """Which file, counted from 0."""
    first_line: int
    """Counted from 1."""
    lines: list[bytes]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What lines become."""

    work: Work
    options: dict[str, Any]
    """All that decides the output besides input and tokenizer, as it goes into the side file."""
    dtype: np.dtype
    """Of the .bin."""
    wanted: str
    """What a line must be, for the error that names one which is not."""


def prepare(
    inputs: Sequence[str],
    *,
    output_prefix: str,
    tokenizer: Tokenizer,
    options: TextOptions,
    workers: int,
    overwrite: bool = False,
    log_interval: int = 100_000,
    commit_interval: int = 20_000,
) -> SideFile:
    """Make ``output_prefix``.bin, .idx and .json of the texts in jsonl files; see `prepare_lines`."""
    check_options(options, tokenizer=tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    job = Job(
        work=functools.partial(encode_lines, tokenizer=tokenizer, options=options, dtype=dtype),
        options=dataclasses.asdict(options),
        dtype=dtype,
        wanted="a JSON object with a text",
    )
    return prepare_lines(
        inputs,
        output_prefix=output_prefix,
        tokenizer=tokenizer,
        job=job,
        workers=workers,
        overwrite=overwrite,
        log_interval=log_interval,
        commit_interval=commit_interval,
    )


def prepare_lines(
    inputs: Sequence[str],
    *,
    output_prefix: str,
    tokenizer: Tokenizer,
    job: Job,
    workers: int,
    overwrite: bool = False,
    log_interval: int = 100_000,
    commit_interval: int = 20_000,
) -> SideFile:
    """Make ``output_prefix``.bin, .idx and .json of jsonl files, or continue where an earlier run stopped.

    inputs: paths and globs of .jsonl, .gz, .xz, .zst. workers: processes; 1 works in this one alone.
    overwrite: replace a data set made from other input or settings; one made by this very call is left alone.
    log_interval: documents between two lines on the console. commit_interval: documents a crash may cost.

    Raises ValueError for missing, damaged or malformed input, for input without a document, for output that
    exists; RuntimeError when a worker process dies or another process prepares the same output.
    """
    for name, value in (
        ("workers", workers),
        ("log_interval", log_interval),
        ("commit_interval", commit_interval),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; leave --{name.replace('_', '-')} out")
    paths = find_inputs(inputs)
    sources = _describe_all(paths)
    decides = _decides(tokenizer, options=job.options, sources=sources)
    existing = _existing(output_prefix, job=decides, overwrite=overwrite)
    if existing is not None:
        say(f"{output_prefix} is already prepared: {existing.totals.documents:,} documents")
        return existing
    encoder = Encoder(job.work, workers=workers)
    with encoder, Draft(output_prefix, job=decides, dtype=job.dtype) as draft:
        if draft.resumed:
            say(f"continuing {draft.folder} after {draft.totals.documents:,} documents")
        with progress(sum(source.bytes for source in sources), f"preparing {output_prefix}") as advance:
            _fill(
                draft,
                encoder=encoder,
                chunks=_chunks(paths, start=draft.position, advance=advance),
                paths=paths,
                wanted=job.wanted,
                log_interval=log_interval,
                commit_interval=commit_interval,
            )
        side = _side_file(draft, tokenizer=tokenizer, options=job.options, sources=sources)
        if side.totals.documents == 0:
            draft.discard()
            raise ValueError(
                f"{output_prefix} must get at least one document, got none ({_reasons(side)}); "
                "check --input, --json-keys and the filters"
            )
        draft.finish(side)
    return side


def _describe_all(paths: Sequence[Path]) -> tuple[Source, ...]:
    """What the input is, byte for byte: a resumed run must not mix two versions of a file."""
    with progress(sum(path.stat().st_size for path in paths), "checking the input") as advance:
        return tuple(describe(path, advance=advance) for path in paths)


def _decides(tokenizer: Tokenizer, *, options: dict[str, Any], sources: Sequence[Source]) -> dict[str, Any]:
    """All that decides the output; where the files lie does not."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "options": options,
        "sources": [source.sha256 for source in sources],
    }


def _existing(prefix: str, *, job: dict[str, Any], overwrite: bool) -> SideFile | None:
    """The finished data set of this very job, if there is one. Raises ValueError for another in its place."""
    side = read_side_file(prefix)
    if side is not None:
        made_by = {
            "fingerprint": side.fingerprint,
            "options": side.options,
            "sources": [source.sha256 for source in side.sources],
        }
        whole = idx_path(prefix).exists() and bin_path(prefix).exists()
        if whole and made_by == job and bin_path(prefix).stat().st_size == side.bin_bytes:
            shutil.rmtree(draft_folder(prefix), ignore_errors=True)  # of a run killed after its last rename
            return side
    begun = read_progress(prefix)
    interrupted = side is None and begun is not None and begun["job"] == job  # inside Draft.finish
    there = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
    if there and not overwrite and not interrupted:
        raise ValueError(
            f"output_prefix must be free, {there[0]} exists and was made from other input or settings; "
            "choose another or pass --overwrite"
        )
    return None


def _fill(
    draft: Draft,
    *,
    encoder: Encoder,
    chunks: Iterator[Chunk],
    paths: Sequence[Path],
    wanted: str,
    log_interval: int,
    commit_interval: int,
) -> None:
    """Append what comes of the chunks, committing now and then and at the end."""
    totals, position = draft.totals, draft.position
    committed = logged = totals.documents
    began, bytes_before = time.monotonic(), totals.bytes
    for chunk, done in encoder.encode(chunks):
        if done.error is not None:
            lines_before, problem = done.error
            raise ValueError(
                f"{paths[chunk.source]}:{chunk.first_line + lines_before} must be {wanted}, "
                f"got {problem}; mend it or pass --skip-malformed"
            )
        draft.append(done.tokens, lengths=done.lengths)
        totals.add(done.totals)
        position = Position(source=chunk.source, line=chunk.first_line - 1 + len(chunk.lines))
        if totals.documents - committed >= commit_interval:
            draft.commit(position, totals=totals)
            committed = totals.documents
        if totals.documents - logged >= log_interval:
            rate = (totals.bytes - bytes_before) / 1e6 / max(time.monotonic() - began, 1e-9)
            say(f"{totals.documents:,} documents, {totals.tokens:,} tokens, {rate:.2f} MB/s of text")
            logged = totals.documents
    draft.commit(position, totals=totals)


def _chunks(paths: Sequence[Path], *, start: Position, advance: Advance) -> Iterator[Chunk]:
    """The lines from ``start`` on, one file a chunk; ``advance`` is told the bytes read from disk."""
    for source, path in enumerate(paths):
        if source < start.source:
            advance(path.stat().st_size)
            continue
        done = start.line if source == start.source else 0
        lines = Lines(path)
        for portion in _portions(itertools.islice(lines, done, None)):
            yield Chunk(source=source, first_line=done + 1, lines=portion)
            done += len(portion)
            advance(lines.newly_read())
        advance(lines.newly_read())


def _portions(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    portion: list[bytes] = []
    size = 0
    for line in lines:
        portion.append(line)
        size += len(line)
        if len(portion) == _CHUNK_LINES or size >= _CHUNK_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _side_file(
    draft: Draft, *, tokenizer: Tokenizer, options: dict[str, Any], sources: tuple[Source, ...]
) -> SideFile:
    totals = draft.totals
    return SideFile(
        tokenizer=tokenizer.kind,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        options=options,
        sources=sources,
        totals=totals,
        dtype=draft.dtype.name,
        bin_bytes=totals.tokens * draft.dtype.itemsize,
    )


def _reasons(side: SideFile) -> str:
    totals = side.totals
    return (
        f"{totals.malformed} lines malformed, {totals.filtered} records filtered, {totals.empty} without text"
        + (f", {totals.too_long} too long" if totals.too_long else "")
    )
