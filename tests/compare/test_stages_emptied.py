"""What was in a stage's folder before it begins: nothing of it stays, nothing of others goes."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sat.compare.stages import LOG, Runner, Stage


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(name="made", folder=tmp_path / "stage", command=(sys.executable, "-c", "print('whole')"))


def _run(stage: Stage) -> bool:
    runner = Runner(environment=os.environ, shown=lambda line: False, working_folder=stage.folder.parent)
    return runner.run(stage)


def test_a_folder_that_no_stage_left_is_not_emptied(stage: Stage) -> None:
    stage.folder.mkdir()
    (stage.folder / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="must be empty or left by a stage, it holds other files"):
        _run(stage)
    assert (stage.folder / "thesis.tex").exists()


def _changed(stage: Stage) -> Stage:
    """Another stage of the same folder, which holds the result of the first one, and a checkpoint."""
    _run(stage)
    (stage.folder / "iter_0000010").mkdir()
    (stage.folder / "iter_0000010" / "weights").write_text("x")
    return replace(stage, made_with="other")


@pytest.mark.parametrize("times", [1, 2])
def test_a_stage_that_was_interrupted_while_its_folder_was_emptied_begins_anew(
    times: int, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes when the log is gone and the rest is there, once or again and again."""

    def interrupted(path: Path, **how: bool) -> None:
        (path / LOG).unlink(missing_ok=True)
        raise KeyboardInterrupt

    later = _changed(stage)
    for _ in range(times):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", interrupted)
            with pytest.raises(KeyboardInterrupt):
                _run(later)
    assert _run(later)
    assert (stage.folder / LOG).read_text() == "whole\n"
    assert not (stage.folder / "iter_0000010").exists()
    assert [path.name for path in stage.folder.parent.iterdir()] == ["stage"]


def test_a_folder_that_cannot_be_emptied_is_said(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    later = _changed(stage)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        with pytest.raises(RuntimeError, match="must be an empty folder .* made one: .*busy: .*; remove or mend what"):
            _run(later)
    assert _run(later)
