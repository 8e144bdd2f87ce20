"""The supervisor with jobs that only pretend: what is tried again, how often, and what comes out."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_sat import supervision
from megatron_sat.supervision import Patience, Supervisor, folder_of
from megatron_sat.training import requests

ROOT = Path(__file__).parents[1]
JOB = """
import pathlib, sys, time
folder, acts = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1], "acts")
first, *rest = acts.read_text().split()
acts.write_text(" ".join(rest))
step, code = first.split(":")
if step == "wait":
    (folder / "waits").touch()
    while not (folder / "stop").exists():
        time.sleep(0.01)
    (folder / "stop").unlink()
elif step == "deaf":
    (folder / "waits").touch()
    time.sleep(60)
elif step:
    (folder / f"iter_{int(step):07d}").mkdir()
    (folder / f"iter_{int(step):07d}" / "metadata.json").touch()
sys.exit(int(code))
"""
"""Each start takes the next of its acts, "STEP:CODE": leave a checkpoint of this step, end with this code."""


def supervised(folder: Path, acts: str, **patience: float) -> tuple[int, list[str], str]:
    """Exit code, what was said, and the acts that were not needed."""
    (folder / "acts").write_text(acts)
    said: list[str] = []
    settings: dict = {"tries": 2, "backoff_seconds": 0.0, **patience}
    command = [sys.executable, "-c", JOB, str(folder)]
    code = Supervisor(command, folder=folder, patience=Patience(**settings), say=said.append).run()
    return code, said, (folder / "acts").read_text()


def test_a_job_that_ends_well_is_started_once(tmp_path: Path) -> None:
    assert supervised(tmp_path, "2:0 4:0") == (0, ["the job ended with 0: it is at its end"], "4:0")


def test_a_job_that_fails_is_started_until_it_is_done_as_long_as_it_gets_further(tmp_path: Path) -> None:
    code, said, left = supervised(tmp_path, "2:1 4:1 6:1 8:-9 10:0")
    assert (code, left) == (0, "")
    assert said[0] == "the job ended with 1 at step 2; it is started again in 0 s"
    assert len(said) == 5


def test_a_job_that_gets_no_further_is_given_up(tmp_path: Path) -> None:
    code, said, left = supervised(tmp_path, "2:1 :7 :8 4:0", tries=3)
    assert (code, left) == (8, "4:0")
    assert said[-1] == "given up after 3 failures at step 2, the last with 8"


def test_a_checkpoint_wins_back_all_tries(tmp_path: Path) -> None:
    assert supervised(tmp_path, "2:1 :1 4:1 :1 6:1 8:0", tries=3)[0] == 0


@pytest.mark.parametrize("code", [2, 3])
def test_what_another_try_cannot_mend_is_not_tried_again(code: int, tmp_path: Path) -> None:
    assert supervised(tmp_path, f":{code} 2:0")[::2] == (code, "2:0")


def test_waits_grow_up_to_ten_minutes() -> None:
    patience = Patience(backoff_seconds=10.0)
    assert [patience.wait_after(n) for n in (0, 1, 2, 3, 7, 50)] == [0.0, 10.0, 20.0, 40.0, 600.0, 600.0]


def signal_when_it_waits(folder: Path) -> None:
    while not (folder / "waits").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGUSR1)


def test_asked_to_make_room_it_asks_the_job_and_returns_the_code_that_requeues(tmp_path: Path) -> None:
    threading.Thread(target=signal_when_it_waits, args=(tmp_path,)).start()
    code, said, left = supervised(tmp_path, "wait:0 2:0", requeue_exit_code=99)
    assert (code, left) == (99, "2:0")
    assert said == ["asked to make room: step 0 is saved, the job ended with 0"]
    assert not (tmp_path / "stop").exists()


def test_a_job_that_does_not_listen_is_terminated_after_its_grace(tmp_path: Path) -> None:
    threading.Thread(target=signal_when_it_waits, args=(tmp_path,)).start()
    code, said, _ = supervised(tmp_path, "deaf:0", grace_seconds=0.2)
    assert code == 75
    assert said == ["asked to make room: step 0 is saved, the job ended with -15"]


def test_the_file_is_the_one_that_runs_look_for() -> None:
    assert supervision.STOP_FILE == requests.STOP_FILE
    assert Patience().requeue_exit_code == 75


@pytest.mark.parametrize("command", ["x --save a --load a", "x --save=a --load=a --lr 1"])
def test_the_folder_is_the_commands_own(command: str) -> None:
    assert folder_of(command.split()) == Path("a")


@pytest.mark.parametrize(
    ("command", "got"),
    [
        ("x --save a", "got --save a, --load not given; add them"),
        ("x --save a --load b", "got --save a, --load b; add them"),
        ("x --load", "got --save not given, --load not given; add them, or name the folder with supervise.py --folder"),
    ],
)
def test_a_command_that_would_start_afresh_each_time_is_refused(command: str, got: str) -> None:
    with pytest.raises(ValueError, match=got):
        folder_of(command.split())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tries": 0}, "--tries must be at least 1, got 0"),
        ({"backoff_seconds": -1.0}, "--backoff-seconds must be at least 0, got -1.0"),
        ({"grace_seconds": float("nan")}, "--grace-seconds must be at least 0, got nan"),
    ],
)
def test_impatience_outside_its_range_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Patience(**settings)


def test_the_tool_runs_a_command_and_says_how_it_ended(tmp_path: Path) -> None:
    (tmp_path / "acts").write_text("2:1 4:0")
    tool = [sys.executable, str(ROOT / "tools" / "supervise.py"), "--backoff-seconds", "0", "--folder", str(tmp_path)]
    job = ["--", sys.executable, "-c", JOB, str(tmp_path)]
    ended = subprocess.run([*tool, *job], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0
    assert ended.stderr.splitlines()[-1] == "supervise.py: the job ended with 0: it is at its end"
    refused = subprocess.run([*tool[:-2], "--", "true"], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("supervise.py: a supervised command needs --save DIR --load DIR")
