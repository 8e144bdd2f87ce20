"""Checkpoints on the disk: named when whole, found by their tracker, missed with a hint."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sat.checkpoint import folder
from megatron_sat.checkpoint.folder import RELEASE, TRACKER


def whole(root: Path, *iterations: int, newest: str | None = None) -> Path:
    """Folders that look like finished checkpoints, and a tracker."""
    for iteration in iterations:
        path = folder.folder_of(root, iteration)
        path.mkdir(parents=True)
        (path / "metadata.json").write_text("{}")
    (root / TRACKER).write_text(newest or str(iterations[-1]))
    return root


def test_the_newest_is_what_the_tracker_says(tmp_path: Path) -> None:
    whole(tmp_path, 10, 30, 20)
    assert folder.find(tmp_path, step=None) == (tmp_path / "iter_0000020", 20)
    assert folder.iterations(tmp_path) == [10, 20, 30]
    assert folder.has_checkpoint(tmp_path)


def test_a_step_is_found_by_its_number_with_or_without_a_tracker(tmp_path: Path) -> None:
    (whole(tmp_path, 10, 12345678) / TRACKER).unlink()
    assert folder.find(tmp_path, step=12345678) == (tmp_path / "iter_12345678", 12345678)
    assert not folder.has_checkpoint(tmp_path)


def test_a_release_has_no_iteration(tmp_path: Path) -> None:
    (tmp_path / RELEASE).mkdir()
    (tmp_path / RELEASE / "metadata.json").write_text("{}")
    (tmp_path / TRACKER).write_text(f"{RELEASE}\n")
    assert folder.find(tmp_path, step=None) == (tmp_path / RELEASE, None)


def test_missing_checkpoints_are_refused_with_what_there_is(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"--load must be a folder with {TRACKER}, .* has none; there is no whole"):
            folder.find(root, step=None)
    whole(tmp_path, 10, 20)
    with pytest.raises(ValueError, match="iter_0000015 is not there; whole ones: 10, 20; choose with --ckpt-step"):
        folder.find(tmp_path, step=15)
    (tmp_path / "iter_0000020" / "metadata.json").unlink()
    with pytest.raises(ValueError, match="iter_0000020 was never finished; whole ones: 10; choose with --ckpt-step"):
        folder.find(tmp_path, step=None)


def test_a_checkpoint_given_instead_of_its_root_is_pointed_out(tmp_path: Path) -> None:
    whole(tmp_path, 10)
    with pytest.raises(ValueError, match=f"has none; try --load {tmp_path} --ckpt-step 10"):
        folder.find(tmp_path / "iter_0000010", step=None)


def test_a_tracker_of_something_else_is_refused(tmp_path: Path) -> None:
    whole(tmp_path, 10, newest="ten")
    with pytest.raises(ValueError, match="must hold an iteration or 'release', got 'ten'; whole ones: 10"):
        folder.find(tmp_path, step=None)


def test_what_a_crash_left_unfinished_goes_with_the_next_one(tmp_path: Path) -> None:
    first = folder.begin(tmp_path / "new", 5)
    (first / "metadata.json").write_text("{}")
    assert folder.iterations(tmp_path / "new") == []
    second = folder.begin(tmp_path / "new", 6)
    assert list((tmp_path / "new").iterdir()) == [second]
    (second / "metadata.json").write_text("{}")
    folder.finish(tmp_path / "new", 6, keep_last=None)
    assert folder.find(tmp_path / "new", step=None)[1] == 6


def test_a_later_iteration_than_the_new_one_does_not_outlive_it_by_number(tmp_path: Path) -> None:
    """After a resume from an older checkpoint the newest is the one just written, whatever its number."""
    whole(tmp_path, 10, 20, 30)
    (folder.begin(tmp_path, 15) / "metadata.json").write_text("{}")
    folder.finish(tmp_path, 15, keep_last=1)
    assert folder.iterations(tmp_path) == [15]


class Crash(BaseException):
    """Ends a process anywhere."""


@pytest.mark.parametrize("moment", range(12))
@pytest.mark.parametrize("keep_last", [None, 1])
def test_a_crash_at_any_moment_of_the_end_leaves_a_whole_checkpoint_that_the_tracker_names(
    moment: int, keep_last: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a checkpoint is written anew, after a resume from an older one."""
    whole(tmp_path, 10, 20)
    (folder.begin(tmp_path, 20) / "metadata.json").write_text("new")
    left = moment

    def crashes(true: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return true(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "replace"), (folder.os, "fsync"), (folder.os, "rmdir")):
            patch.setattr(owner, name, crashes(getattr(owner, name)))
        patch.setattr(folder.os, "unlink", crashes(folder.os.unlink))
        try:
            folder.finish(tmp_path, 20, keep_last=keep_last)
        except Crash:
            pass
        else:
            assert left >= 0
    found, step = folder.find(tmp_path, step=None)
    assert step == 20 and (found / "metadata.json").read_text() in ("{}", "new")
    assert all((folder.folder_of(tmp_path, i) / "metadata.json").is_file() for i in folder.iterations(tmp_path))
    (folder.begin(tmp_path, 30) / "metadata.json").write_text("{}")
    folder.finish(tmp_path, 30, keep_last=1)
    assert {path.name for path in tmp_path.iterdir()} <= {"iter_0000030", TRACKER, f"{TRACKER}.unfinished"}


def test_what_the_system_says_to_a_writer_is_told(tmp_path: Path) -> None:
    assert folder.writing_trouble(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert folder.writing_trouble(tmp_path / "absent") == (errno.ENOENT, "No such file or directory")
