"""A draft continues from what was committed, keeps others out, and outlives a crash while it is finished."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sat.data import draft as draft_module
from megatron_sat.data.draft import Draft, Position, draft_folder, read_progress
from megatron_sat.data.index_file import read_index
from megatron_sat.data.side_file import SideFile, Totals, read_side_file

U2 = np.dtype("<u2")
JOB: dict[str, Any] = {"sources": ("a",), "options": {}}


class Crash(BaseException):
    """What no handler of ours catches."""


def open_draft(tmp_path: Path, job: dict[str, Any] = JOB) -> Draft:
    return Draft(str(tmp_path / "x"), job=job, dtype=U2)


def append(draft: Draft, *documents: list[int]) -> None:
    tokens = np.array([i for document in documents for i in document], dtype=U2)
    draft.append(tokens, lengths=np.array([len(document) for document in documents]))


def side_for(draft: Draft) -> SideFile:
    return SideFile(
        tokenizer="null",
        fingerprint="0",
        vocab_size=9,
        eod=8,
        options={},
        sources=(),
        totals=draft.totals,
        dtype="uint16",
        bin_bytes=2 * draft.totals.tokens,
    )


def test_what_was_committed_is_there_again_and_what_was_not_is_cut_off(tmp_path):
    with open_draft(tmp_path) as draft:
        append(draft, [1, 2], [3])
        draft.commit(Position(source=0, line=2), totals=Totals(documents=2, tokens=3))
        append(draft, [7, 7, 7])
    with open_draft(tmp_path) as draft:
        assert (draft.resumed, draft.position, draft.totals.documents) == (
            True,
            Position(source=0, line=2),
            2,
        )
        append(draft, [4, 5])
        draft.commit(Position(source=0, line=3), totals=Totals(documents=3, tokens=5))
        draft.finish(side_for(draft))
    assert np.fromfile(tmp_path / "x.bin", dtype=U2).tolist() == [1, 2, 3, 4, 5]
    assert read_index(str(tmp_path / "x")).lengths.tolist() == [2, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_a_draft_of_another_job_is_started_afresh(tmp_path):
    with open_draft(tmp_path) as draft:
        append(draft, [1])
        draft.commit(Position(source=0, line=1), totals=Totals(documents=1, tokens=1))
    with open_draft(tmp_path, JOB | {"options": {"key": "other"}}) as draft:
        assert (draft.resumed, draft.position, draft.totals) == (False, Position(), Totals())
        draft.commit(Position(), totals=draft.totals)
    assert (draft_folder(str(tmp_path / "x")) / "tokens.bin").stat().st_size == 0


def test_what_another_job_left_uncommitted_is_never_taken_for_ones_own(tmp_path):
    with open_draft(tmp_path) as draft:
        append(draft, [1])
        draft.commit(Position(source=0, line=1), totals=Totals(documents=1, tokens=1))
    with open_draft(tmp_path, JOB | {"options": {"key": "other"}}) as draft:
        append(draft, [7, 7, 7], [7])
    with open_draft(tmp_path) as draft:
        assert not draft.resumed


@pytest.mark.parametrize("lost", ["tokens.bin", "lengths.bin"])
def test_a_draft_that_lost_a_file_is_started_afresh(tmp_path, lost):
    with open_draft(tmp_path) as draft:
        append(draft, [1])
        draft.commit(Position(source=0, line=1), totals=Totals(documents=1, tokens=1))
    (draft.folder / lost).unlink()
    with open_draft(tmp_path) as draft:
        assert not draft.resumed


def test_two_processes_do_not_write_one_draft(tmp_path):
    with (
        open_draft(tmp_path),
        pytest.raises(
            RuntimeError, match=r"one process at a time may prepare .*x, another holds .*x.unfinished"
        ),
        open_draft(tmp_path),
    ):
        pass


@pytest.mark.parametrize("last", ["nothing", ".bin", ".idx", ".json", "all but the folder"])
def test_a_crash_at_any_moment_of_finishing_is_made_good_by_the_next_run(tmp_path, monkeypatch, last):
    rename, true_rmtree = Path.replace, draft_module.shutil.rmtree

    def rename_and_crash(self: Path, target: Path) -> Path:
        if last == "nothing" and target.suffix == ".bin":
            raise Crash
        renamed = rename(self, target)
        if target.parent == tmp_path and target.suffix == last:
            raise Crash
        return renamed

    def crash(*args: object, **kw: object) -> None:
        raise Crash

    with open_draft(tmp_path) as draft:
        append(draft, [1, 2], [3])
        draft.commit(Position(source=0, line=2), totals=Totals(documents=2, tokens=3))
        monkeypatch.setattr(Path, "replace", rename_and_crash)
        monkeypatch.setattr(draft_module.shutil, "rmtree", crash)
        with pytest.raises(Crash):
            draft.finish(side_for(draft))
    monkeypatch.setattr(Path, "replace", rename)
    monkeypatch.setattr(draft_module.shutil, "rmtree", true_rmtree)
    done = read_side_file(str(tmp_path / "x")) is not None
    assert done == (last in (".json", "all but the folder"))
    if done:
        assert read_index(str(tmp_path / "x")).tokens == 3
        return
    with open_draft(tmp_path) as draft:
        assert draft.resumed
        draft.finish(side_for(draft))
    assert np.fromfile(tmp_path / "x.bin", dtype=U2).tolist() == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_a_discarded_draft_is_gone(tmp_path):
    with open_draft(tmp_path) as draft:
        draft.discard()
    assert list(tmp_path.iterdir()) == []
    assert read_progress(str(tmp_path / "x")) is None
