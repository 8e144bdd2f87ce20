"""The store: what goes in comes out, many may write at once, and what is not ours is not touched."""

import math
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_sat.compare import history
from megatron_sat.compare.history import VERSION, Entry, append, open_store, settings_digest, trend
from megatron_sat.compare.study import Spread


def _entry(number: int = 0, **changes: Any) -> Entry:
    fields: dict[str, Any] = {
        "at": f"2026-01-{number + 1:02}T00:00:00+00:00",
        "name": "small",
        "commits": "abc",
        "machine": "2 CPU cores",
        "libraries": "torch",
        "settings": {"steps": 3},
        "left_out": (),
        "figures": {
            "dense": {"zh_bpc": Spread(values={1: 2.0, 2: 2.5}), "seconds": Spread(values={1: 9.0, 2: 9.5})},
            "sat": {"zh_bpc": Spread(values={1: 3.0 + number, 2: 3.5})},
        },
    }
    return Entry(**fields | changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "compare.sqlite"


def test_what_was_remembered_comes_back_the_oldest_first(path: Path) -> None:
    for number in (1, 0):
        assert append(path, _entry(number))
    points = trend(path, figures=["zh_bpc"], variants=["sat"])
    assert [point.at[:10] for point in points] == ["2026-01-01", "2026-01-02"]
    assert [dict(point.spread.values) for point in points] == [{1: 3.0, 2: 3.5}, {1: 4.0, 2: 3.5}]
    (first, _) = points
    assert (first.name, first.commits, first.machine) == ("small", "abc", "2 CPU cores")
    assert first.settings_digest == settings_digest({"steps": 3}) != settings_digest({"steps": 4})


def test_without_a_choice_everything_comes_back(path: Path) -> None:
    append(path, _entry())
    found = [(point.variant, point.figure) for point in trend(path)]
    assert found == [("dense", "seconds"), ("dense", "zh_bpc"), ("sat", "zh_bpc")]


def test_the_same_comparison_is_remembered_once_whenever_it_is_reported(path: Path) -> None:
    assert append(path, _entry())
    assert not append(path, _entry(at="2027-01-01T00:00:00+00:00"))
    assert append(path, _entry(commits="def"))
    assert append(path, _entry(left_out=("rate_0",)))
    assert len(trend(path, figures=["zh_bpc"], variants=["dense"])) == 3


def test_numbers_that_are_none_come_back_as_they_were(path: Path) -> None:
    append(path, _entry(figures={"sat": {"seconds_to_dense": Spread(values={1: math.inf, 2: math.nan})}}))
    (point,) = trend(path)
    assert point.spread.values[1] == math.inf
    assert math.isnan(point.spread.values[2])


def test_many_writers_lose_nothing(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: append(path, _entry(number)), [*range(20), *range(20)]))
    assert sorted(made) == [False] * 20 + [True] * 20
    assert len(trend(path, figures=["zh_bpc"], variants=["sat"])) == 20


def test_a_writer_that_fails_leaves_nothing_behind(path: Path) -> None:
    append(path, _entry())

    def fails() -> None:
        with open_store(path, writes=True) as store:
            store.execute("DELETE FROM figure")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert len(trend(path)) == 3


def test_a_store_of_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    append(path, _entry())
    with sqlite3.connect(path) as store:
        store.execute(f"PRAGMA user_version = {VERSION + 1}")
    before = path.read_bytes()
    for use in (lambda: append(path, _entry(1)), lambda: trend(path)):
        with pytest.raises(ValueError, match="must be of version 1 at most, .* is of version 2; use the newer"):
            use()
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as store:
        store.execute("CREATE TABLE mine (x)")
    with pytest.raises(ValueError, match="must be a store of comparisons, .*other.db is of another program"):
        append(tmp_path / "other.db", _entry())


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 5000)
    with pytest.raises(ValueError, match="must be a store of comparisons, .*text is not: file is not a database"):
        append(tmp_path / "text", _entry())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="must be a file that can be read and written, .* is not: unable to open"):
        append(tmp_path, _entry())


def test_a_writer_that_waits_too_long_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(path, _entry())
    monkeypatch.setattr(history, "PATIENCE_SECONDS", 0.1)
    with open_store(path, writes=True), pytest.raises(RuntimeError, match="is not: database is locked"):
        append(path, _entry(1))


def test_a_history_that_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="must be a file that tools/compare.py run has left, .* is none"):
        trend(path)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"figures": ["bpc"]}, "--figure must be in the history, bpc is not; there are seconds, zh_bpc"),
        ({"variants": ["spdf"]}, "--variant must be in the history, spdf is not; there are dense, sat"),
    ],
)
def test_what_nobody_measured_is_refused(asked: dict[str, list[str]], says: str, path: Path) -> None:
    append(path, _entry())
    with pytest.raises(ValueError, match=says):
        trend(path, **asked)


def test_a_figure_and_a_variant_that_were_never_measured_together_are_refused(path: Path) -> None:
    """Each is known, so that nothing would be left to show or to draw."""
    append(path, _entry())
    with pytest.raises(ValueError, match="must be one that a --variant has, got seconds of sat; there are zh_bpc"):
        trend(path, figures=["seconds"], variants=["sat"])
    assert {point.variant for point in trend(path, figures=["seconds"], variants=["sat", "dense"])} == {"dense"}


def test_a_history_without_figures_is_refused(path: Path) -> None:
    append(path, _entry(figures={}))
    with pytest.raises(ValueError, match="must hold a comparison with figures, .*compare.sqlite holds none; run one"):
        trend(path)
