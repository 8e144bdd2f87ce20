"""Where a result comes from is said, also where git or a GPU is missing."""

import subprocess
from pathlib import Path

import pytest

from megatron_sat.compare import provenance


def _git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_a_commit_is_named_and_so_are_changes_since(tmp_path: Path) -> None:
    _git(tmp_path, "init")
    (tmp_path / "file").write_text("a")
    _git(tmp_path, "add", "file")
    _git(tmp_path, "commit", "-m", "first")
    clean = provenance.commit_of(tmp_path)
    assert 6 < len(clean) < 15
    (tmp_path / "file").write_text("b")
    assert provenance.commit_of(tmp_path) == f"{clean}, with changes"


def test_a_folder_outside_git_has_no_known_commit(tmp_path: Path) -> None:
    assert provenance.commit_of(tmp_path) == "unknown"


def test_a_program_that_is_missing_or_fails_says_nothing() -> None:
    assert provenance._said(["no such program"]) == ""
    assert provenance._said(["false"]) == ""


def test_the_machine_is_its_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance.torch.cuda, "is_available", lambda: False)
    assert provenance.machine().endswith("CPU cores")
    monkeypatch.setattr(provenance.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(provenance.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(provenance, "_said", lambda command: "A100\nA100")
    assert provenance.machine().startswith("2 x A100, ")


def test_libraries_are_named_with_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "megatron-core 0." in provenance.libraries()
    monkeypatch.setattr(provenance, "LIBRARIES", ("no-such-library",))
    assert provenance.libraries().endswith("no-such-library unknown")
