"""A small local store of what comparisons found, one SQLite file: a figure's trend over commits and machines.

Several processes may append at once: each comparison is one transaction that waits for the others'. The same
comparison, reported again, is not appended again. A file of a newer version, or of another program, is refused.
"""

import hashlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sat.compare.claim import make_folder
from megatron_sat.compare.study import Spread

APPLICATION = 0x5A7C0A9E
"""SQLite's application_id of our files."""
VERSION = 1
"""Of the tables."""
PATIENCE_SECONDS = 60.0
"""How long a writer waits for others."""
_TABLES = """
CREATE TABLE comparison (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, at TEXT NOT NULL, name TEXT NOT NULL, commits TEXT NOT NULL,
    machine TEXT NOT NULL, libraries TEXT NOT NULL, settings_digest TEXT NOT NULL, settings TEXT NOT NULL,
    left_out TEXT NOT NULL
);
CREATE TABLE figure (
    comparison INTEGER NOT NULL REFERENCES comparison (id), variant TEXT NOT NULL, figure TEXT NOT NULL,
    seed INTEGER NOT NULL, value REAL, PRIMARY KEY (comparison, variant, figure, seed)
) WITHOUT ROWID;
CREATE INDEX figures_by_name ON figure (figure, variant);
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A comparison, to be remembered."""

    at: str
    """When, ISO 8601."""
    name: str
    """The experiment's."""
    commits: str
    machine: str
    libraries: str
    settings: Mapping[str, Any]
    """All that decides the result; plain values."""
    left_out: Sequence[str]
    figures: Mapping[str, Mapping[str, Spread]]
    """By group, then by name."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A figure of a variant in one comparison."""

    at: str
    name: str
    commits: str
    machine: str
    settings_digest: str
    """Equal ones were asked for the same."""
    variant: str
    figure: str
    spread: Spread


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def append(path: Path, entry: Entry) -> bool:
    """Remember a comparison; returns False where it was remembered before. Raises what `open_store` raises."""
    rows = [
        (variant, figure, seed, None if math.isnan(value) else value)
        for variant, figures in entry.figures.items()
        for figure, spread in figures.items()
        for seed, value in spread.values.items()
    ]
    settings = json.dumps(entry.settings, sort_keys=True, default=str)
    content = [entry.name, entry.commits, entry.machine, entry.libraries, settings, list(entry.left_out), rows]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    with open_store(path, writes=True) as store:
        made = store.execute(
            "INSERT OR IGNORE INTO comparison (digest, at, name, commits, machine, libraries, settings_digest, "
            "settings, left_out) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(digest, entry.at, entry.name, entry.commits, entry.machine, entry.libraries),
                *(settings_digest(entry.settings), settings, ", ".join(entry.left_out)),
            ),
        )
        if made.rowcount == 0:
            return False
        store.executemany("INSERT INTO figure VALUES (?, ?, ?, ?, ?)", [(made.lastrowid, *row) for row in rows])
    return True


def trend(path: Path, *, figures: Sequence[str] = (), variants: Sequence[str] = ()) -> list[Point]:
    """What was remembered, the oldest first, at least one. figures, variants: those alone; empty: all.

    Raises ValueError where there is no store, or nothing of what was asked for, and what `open_store` raises.
    """
    if not path.is_file():
        raise ValueError(f"--history must be a file that tools/compare.py run has left, {path} is none; run one first")
    with open_store(path, writes=False) as store:
        rows = store.execute(
            "SELECT c.id, c.at, c.name, c.commits, c.machine, c.settings_digest, f.variant, f.figure, f.seed, f.value "
            "FROM figure f JOIN comparison c ON c.id = f.comparison ORDER BY c.at, c.id, f.variant, f.figure, f.seed"
        ).fetchall()
    if not rows:
        raise ValueError(f"--history must hold a comparison with figures, {path} holds none; run one first")
    for what, asked, column in (("--figure", figures, 7), ("--variant", variants, 6)):
        known = sorted({row[column] for row in rows})
        if missing := [name for name in asked if name not in known]:
            raise ValueError(f"{what} must be in the history, {missing[0]} is not; there are {', '.join(known)}")
    values: dict[tuple[Any, ...], dict[int, float]] = {}
    for *key, seed, value in rows:
        if (not figures or key[7] in figures) and (not variants or key[6] in variants):
            values.setdefault(tuple(key), {})[seed] = math.nan if value is None else value
    if not values:
        had = sorted({row[7] for row in rows if row[6] in variants})
        raise ValueError(
            f"--figure must be one that a --variant has, got {' and '.join(figures)} of {' and '.join(variants)}; "
            f"there are {', '.join(had)}"
        )
    return [_point(key, found) for key, found in values.items()]


def _point(key: tuple[Any, ...], values: Mapping[int, float]) -> Point:
    _, at, name, commits, machine, digest, variant, figure = key
    return Point(
        at=at,
        name=name,
        commits=commits,
        machine=machine,
        settings_digest=digest,
        variant=variant,
        figure=figure,
        spread=Spread(values=values),
    )


@contextmanager
def open_store(path: Path, *, writes: bool) -> Iterator[sqlite3.Connection]:
    """The store in one transaction, made if it is not there and is written to.

    Raises ValueError for a file of a newer version or of another program, RuntimeError where it cannot be had.
    """
    try:
        if writes:
            make_folder(path.parent, flag="--history")
        store = sqlite3.connect(path, timeout=PATIENCE_SECONDS, isolation_level=None)
        try:
            store.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            _check(store, path=path, writes=writes)
            yield store
            store.execute("COMMIT")
        finally:
            store.close()  # what was not committed is undone
    except sqlite3.OperationalError as error:
        raise RuntimeError(
            f"--history must be a file that can be read and written, {path} is not: {error}; choose another"
        ) from error
    except sqlite3.DatabaseError as error:
        raise ValueError(f"--history must be a store of comparisons, {path} is not: {error}; choose another") from error


def _check(store: sqlite3.Connection, *, path: Path, writes: bool) -> None:
    (application,) = store.execute("PRAGMA application_id").fetchone()
    (version,) = store.execute("PRAGMA user_version").fetchone()
    (tables,) = store.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables and writes:
        for statement in _TABLES.split(";"):
            store.execute(statement)
        store.execute(f"PRAGMA application_id = {APPLICATION}")
        store.execute(f"PRAGMA user_version = {VERSION}")
    elif application != APPLICATION:
        raise ValueError(f"--history must be a store of comparisons, {path} is of another program; choose another")
    elif version > VERSION:
        raise ValueError(
            f"--history must be of version {VERSION} at most, {path} is of version {version}; use the newer "
            "tools/compare.py that wrote it, or another file"
        )
