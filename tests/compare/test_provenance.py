"""Where a result comes from is said, also where git or a GPU is missing."""

import os
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


def test_a_machine_without_gpus_is_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(provenance, "device_names", lambda *_, **__: pytest.fail("it was asked"))
    assert provenance.machine() == f"{len(os.sched_getaffinity(0))} CPU cores"


def _program(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An A100, an H100 and an A100. The driver's tool says all of them, torch those that are visible."""
    _program(tmp_path / "nvidia-smi", "echo A100; echo H100; echo A100")
    shown = """case ${CUDA_VISIBLE_DEVICES-all} in all) echo '["A100", "H100", "A100"]';; 1) echo '["H100"]';;"""
    python = _program(tmp_path / "python", f"""{shown} 2,0) echo '["A100", "A100"]';; *) exit 1;; esac""")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(provenance.sys, "executable", str(python))
    monkeypatch.setattr(provenance.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(provenance.torch.cuda, "device_count", lambda: 1)
    return monkeypatch


@pytest.mark.parametrize(
    ("visible", "said"),
    [("1", "1 x H100"), ("2,0", "2 x A100"), (None, "1 x A100, 1 x H100, 1 x A100"), ("0", "1 x GPU")],
)
def test_a_machine_is_the_gpus_that_are_visible_and_its_cores(
    visible: str | None, said: str, host: pytest.MonkeyPatch
) -> None:
    """Results of one kind are not kept beside another's. Where torch does not say the kind, a GPU is all it is."""
    if visible is not None:
        host.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert provenance.machine() == f"{said}, {len(os.sched_getaffinity(0))} CPU cores"


def test_a_machine_is_named_without_the_drivers_tool_and_without_a_context_here(
    host: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nvidia-smi").unlink()
    host.setattr(provenance.torch.cuda, "_lazy_init", lambda: pytest.fail("this process began to use the GPU"))
    assert provenance.machine().startswith("1 x A100, 1 x H100, 1 x A100, ")


def test_libraries_are_named_with_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "megatron-core 0." in provenance.libraries()
    monkeypatch.setattr(provenance, "LIBRARIES", ("no-such-library",))
    assert provenance.libraries().endswith("no-such-library unknown")
