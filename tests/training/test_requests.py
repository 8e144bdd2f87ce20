"""What is asked of a run: by signal on any rank, by file on rank 0, once each."""

import os
import signal
from pathlib import Path

import pytest

from megatron_sat.training.requests import LOOK_SECONDS, SAVE_FILE, STOP_FILE, Requests, Wish


class Clock:
    """Stands where it is put."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_asked_for_without_signal_or_file(tmp_path: Path) -> None:
    assert Requests(tmp_path).look() is Wish.NOTHING
    assert Requests(None).look() is Wish.NOTHING


@pytest.mark.parametrize(("name", "wish"), [(SAVE_FILE, Wish.SAVE), (STOP_FILE, Wish.STOP)])
def test_a_file_is_a_wish_once_and_is_gone_after_it(name: str, wish: Wish, tmp_path: Path) -> None:
    clock = Clock()
    requests = Requests(tmp_path, clock=clock)
    (tmp_path / name).touch()
    assert requests.look() is wish
    assert list(tmp_path.iterdir()) == []
    clock.now += LOOK_SECONDS
    assert requests.look() is Wish.NOTHING


def test_both_files_are_a_wish_to_stop(tmp_path: Path) -> None:
    for name in (SAVE_FILE, STOP_FILE):
        (tmp_path / name).touch()
    assert Requests(tmp_path).look() is Wish.STOP
    assert list(tmp_path.iterdir()) == []


def test_files_are_looked_for_now_and_then(tmp_path: Path) -> None:
    clock = Clock()
    requests = Requests(tmp_path, clock=clock)
    requests.look()
    (tmp_path / STOP_FILE).touch()
    clock.now += LOOK_SECONDS / 2
    assert requests.look() is Wish.NOTHING
    clock.now += LOOK_SECONDS / 2
    assert requests.look() is Wish.STOP


def test_a_folder_of_that_name_is_no_wish(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).mkdir()
    assert Requests(tmp_path).look() is Wish.NOTHING


def test_a_signal_is_a_wish_that_stays_and_outweighs_files(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    before = signal.getsignal(signal.SIGUSR1)
    with requests.listening(signal.SIGUSR1):
        os.kill(os.getpid(), signal.SIGUSR1)
        (tmp_path / SAVE_FILE).touch()
        assert requests.look() is requests.look() is Wish.REQUEUE
    assert signal.getsignal(signal.SIGUSR1) == before


def test_without_a_signal_to_listen_to_none_is_taken_over() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Requests(None).listening(None):
        assert signal.getsignal(signal.SIGTERM) == before
