"""A program is run as it would be by itself, and what it took is left behind, also when it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sat.compare import measured
from megatron_sat.compare.measured import main, read_measured

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from beside import MEGABYTES
held = bytearray(MEGABYTES * 2**20)
held[:: 4096] = b"x" * len(held[:: 4096])
print(sys.argv, __name__)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("MEGABYTES = 300\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


@pytest.mark.parametrize("code", [0, 3])
def test_a_program_is_run_as_by_itself_and_its_memory_is_left(code: int, program: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_sat.compare.measured", "--into", str(tmp_path / "out"), str(program)]
    done = subprocess.run([*command, str(code), "--flag"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert done.stdout == f"{[str(program), str(code), '--flag']} __main__\n"
    found = read_measured(tmp_path / "out")
    assert 0.3 < found.peak_memory_bytes / 2**30 < 3
    assert (found.device, found.commits) == ("cpu", ("unknown",))  # the program lies in no repository


def _left(folder: Path, name: str, *, gib: int, commit: str, seconds: int) -> None:
    content = {"peak_memory_bytes": gib * 2**30, "device": "cuda", "commits": [commit]}
    (folder / f"measured-{name}.json").write_text(json.dumps(content))
    os.utime(folder / f"measured-{name}.json", (seconds, seconds))


def test_of_several_processes_the_highest_counts_and_every_commit_is_known(tmp_path: Path) -> None:
    _left(tmp_path, "a-1", gib=2, commit="new", seconds=200)
    _left(tmp_path, "a-2", gib=5, commit="old", seconds=100)
    _left(tmp_path, "b-1", gib=3, commit="new", seconds=300)
    found = read_measured(tmp_path)
    assert (found.peak_memory_bytes, found.commits) == (5 * 2**30, ("old", "new"))


def test_on_a_gpu_what_torch_allocated_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured.torch.cuda, "max_memory_allocated", lambda: 12)
    assert measured._peak(cuda=True) == 12
    assert measured._peak(cuda=False) > 2**20


def test_a_folder_where_nothing_was_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold what was measured of a run, it does not; remove it and run it"):
        read_measured(tmp_path)


@pytest.mark.parametrize("argv", [[], ["--into", "x"], ["program.py", "--into", "x"]])
def test_a_command_line_without_a_program_is_refused(argv: list[str]) -> None:
    with pytest.raises(ValueError, match="measured must be given a folder and a program, got .*; write measured"):
        main(argv)
