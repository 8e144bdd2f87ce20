"""GPUs for runs side by side: how they are found, what is refused, who gets which. No test needs one."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_sat.compare.devices import VISIBLE, Device, alike, check_count, places, visible_devices
from megatron_sat.compare.stages import Place


def _interpreter(folder: Path, *lines: str) -> str:
    """What answers in place of Python with torch."""
    path = folder / "python"
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


def _devices(*names: str) -> list[Device]:
    return [Device(handle=str(number), name=name) for number, name in enumerate(names)]


@pytest.mark.parametrize(
    ("environment", "handles"),
    [
        ({}, ["0", "1"]),
        ({VISIBLE: "6, 2"}, ["6", "2"]),
        ({VISIBLE: "GPU-a,GPU-b,-1"}, ["GPU-a", "GPU-b"]),  # CUDA sees nothing from the first wrong entry on
    ],
)
def test_gpus_are_called_as_the_environment_calls_them(
    environment: Mapping[str, str], handles: list[str], tmp_path: Path
) -> None:
    python = _interpreter(tmp_path, "echo a word of torch", """echo '["A100", "H100"]'""")
    found = visible_devices({"PATH": os.environ["PATH"], **environment}, python=python)
    assert [(device.handle, device.name) for device in found] == list(zip(handles, ["A100", "H100"], strict=True))


def test_the_process_that_is_asked_sees_the_environment_of_the_commands(tmp_path: Path) -> None:
    python = _interpreter(tmp_path, f'echo "[\\"${VISIBLE}\\"]"')
    assert visible_devices({"PATH": os.environ["PATH"], VISIBLE: "3"}, python=python) == (Device(handle="3", name="3"),)


def test_torch_says_that_no_gpu_is_visible() -> None:
    assert visible_devices(os.environ | {VISIBLE: ""}, python=sys.executable) == ()


def test_gpus_that_do_not_say_their_names_are_an_error(tmp_path: Path) -> None:
    python = _interpreter(tmp_path, "echo more >&2", "echo CUDA error: unknown >&2", "exit 1")
    with pytest.raises(RuntimeError, match="--gpus needs the names .* torch says instead: CUDA error: unknown; see"):
        visible_devices(os.environ, python=python)
    with pytest.raises(RuntimeError, match="torch says instead: nothing; see what nvidia-smi says"):
        visible_devices(os.environ, python=_interpreter(tmp_path, "exit 1"))
    with pytest.raises(RuntimeError, match=r"torch says instead: nothing in 0\.1 s"):
        visible_devices(os.environ, python=_interpreter(tmp_path, "exec sleep 30"), patience=0.1)


@pytest.mark.parametrize(
    ("count", "ranks", "says"),
    [
        (0, 1, "--gpus must be at least 1, got 0; leave it out for one run at a time"),
        (4, 2, r"--gpus \(4\) gives a run one GPU, budget: ranks \(2\) makes .* several processes; set ranks to 1"),
    ],
)
def test_what_gpus_cannot_be_is_refused(count: int, ranks: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_count(count, ranks=ranks)


def test_no_turns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--turns must be at least 1, got 0; leave it out for runs one after"):
        check_count(1, ranks=1, turns=0)


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (1, 8), (8, 1)])
def test_one_gpu_goes_with_any_ranks_and_any_gpus_with_one(count: int, ranks: int) -> None:
    check_count(count, ranks=ranks)


@pytest.mark.parametrize(
    ("devices", "count", "says"),
    [
        ([], 2, r"--gpus \(2\) needs CUDA, torch sees no GPU; leave it out for one run at a time"),
        (_devices("A", "A"), 3, r"at most the number of GPUs that are visible \(2\), got 3; give 2, or show more"),
        (
            _devices("A", "B", "B"),
            2,
            rf"--gpus \(2\) needs GPUs of one kind.*, got 1 x A, 1 x B; set {VISIBLE}=1,2 and give at most 2",
        ),
    ],
)
def test_gpus_that_cannot_be_compared_are_refused(devices: list[Device], count: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        alike(devices, count=count)


def test_the_first_gpus_are_taken_where_they_are_alike() -> None:
    assert alike(_devices("A", "A", "A", "B"), count=2) == ("0", "1")


def test_places_go_round_the_gpus() -> None:
    assert [place.device for place in places(("x", "y"), at_once=5)] == ["x", "y", "x", "y", "x"]
    assert places(("x", "y"), at_once=2) == [Place(device="x", at_once=2), Place(device="y", at_once=2)]
    assert places((), at_once=3) == 3 * [Place(at_once=3)]


def test_places_that_take_turns_have_one_file_for_each_gpu(tmp_path: Path) -> None:
    found = places(("x", "y"), at_once=2, turns=3, turn=tmp_path)
    one, other = (
        Place(device=device, at_once=2, turn=tmp_path / name) for device, name in (("x", "0-x"), ("y", "1-y"))
    )
    assert found == 3 * [one, other]
    assert places((), at_once=1, turns=2, turn=tmp_path) == 2 * [Place(turn=tmp_path / "0-any")]


def test_places_on_devices_share_the_cores_out() -> None:
    assert Place(device="0", at_once=3).threads(16) == 5
    assert Place(device="0", at_once=3).threads(2) == 1
    assert Place(at_once=3).threads(16) == 16  # as without GPUs: threads may decide the last bit there
