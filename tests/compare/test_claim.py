"""A comparison's folder: one command at a time, and refused at once where none can be."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sat.compare.claim import LOCK, claimed, make_folder

HOLDING = """
import sys, time
from pathlib import Path
from megatron_sat.compare.claim import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_command_is_refused_until_the_first_has_ended_however_it_ends(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(out)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(RuntimeError, match=f"one command at a time may work in {out}, another does; wait"):
            claimed(out).__enter__()
    finally:
        first.kill()
        first.communicate()
    with claimed(out):
        assert (out / LOCK).is_file()
    with claimed(out):
        pass


def test_a_folder_that_cannot_be_is_refused_by_the_flag_that_named_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ValueError, match=f"--out must lie where a folder can be, {folder} cannot be made: "):
            claimed(folder).__enter__()
    with pytest.raises(ValueError, match="--history must lie where a folder can be"):
        make_folder(tmp_path / "file" / "x", flag="--history")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(ValueError, match="--out must be a folder that can be written to, .* is not: "):
        claimed(tmp_path).__enter__()
