"""A pretended comparison over several GPUs: who runs where, beside whom, and after whom."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sat.compare.lab import Lab
from megatron_sat.compare.study import Study
from tests.compare.pretended import CONTROLS, FIRST, RUNS, SAME, conduct_of, lab_in, made, other_lab


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return lab_in(tmp_path)


def _devices(lab: Lab, **how: Any) -> tuple[Study, dict[str, str]]:
    """What came of it, and of each run GROUP-SEED its device and its threads."""
    folder = lab.shop.root / "devices"
    folder.mkdir()
    study, _ = made(lab, DEVICES=str(folder), **how)
    return study, {path.name: path.read_text() for path in folder.iterdir()}


ON_DEVICES = {"start-1", "start-2", "dense-1", "sat-1", "sat_rate_0-1", "dense-2", "sat-2"}
EQUAL = {"dense_20_steps-1", "dense_20_steps-2"}


def test_runs_side_by_side_have_a_device_each_and_share_the_cores_out(lab: Lab) -> None:
    """A pretended run fails where another one is on its device."""
    study, found = _devices(lab, gpus=("4", "GPU-7"))
    assert set(found) == ON_DEVICES | EQUAL
    assert {found[name] for name in ("start-1", "start-2")} == {"4 1", "GPU-7 1"}
    assert set(found.values()) == {"4 1", "GPU-7 1"}
    assert not study.shared
    assert study.at_once == (2,)


def test_one_run_at_a_time_has_all_cores_and_sees_what_the_harness_sees(lab: Lab) -> None:
    study, found = _devices(lab, jobs=3, CUDA_VISIBLE_DEVICES="2,3")
    assert set(found.values()) == {"2,3 2"}
    assert study.at_once == (1,)


def test_two_runs_on_one_device_would_be_noticed(lab: Lab) -> None:
    with pytest.raises(RuntimeError, match="must end with 0.*(?s:.*)FileExistsError"):
        _devices(lab, gpus=("0", "0"))


def test_runs_that_take_turns_are_begun_together_and_hold_the_device_one_at_a_time(lab: Lab) -> None:
    study, found = _devices(lab, turns=3)
    assert set(found) == ON_DEVICES | EQUAL
    assert (study.turns, study.at_once, study.shared) == (3, (1,), False)
    assert len(conduct_of(lab, turns=3).places) == 3


def test_runs_begin_seed_by_seed_and_controls_after_all_that_they_follow_from(lab: Lab) -> None:
    _, calls = made(lab, gpus=("0", "1"))
    assert calls[0] == "text"
    assert set(calls[1:3]) == set(FIRST[1:])
    assert set(calls[3:8]) == set(RUNS)
    assert set(calls[8:10]) == set(CONTROLS)
    assert calls[10:] == SAME


def test_what_one_gpu_made_is_kept_beside_what_several_make(lab: Lab) -> None:
    made(lab)
    again, calls = made(other_lab(lab, seeds=[1, 2, 3]), gpus=("0", "1"))
    assert sorted(calls) == ["dense/3 40", "dense_20_steps/3 20", "sat/3 40", "start/3 1"]
    assert again.at_once == (1, 2)


def test_with_times_left_out_runs_share_gpus_in_turn_and_fewer_do_not_share(lab: Lab) -> None:
    without = ("dense_equal_time",)
    shared = conduct_of(lab, gpus=("a", "b"), jobs=5, without=without)
    assert shared.shared
    assert [place.device for place in shared.places] == ["a", "b", "a", "b", "a"]
    alone = conduct_of(lab, gpus=("a", "b"), jobs=2, without=without)
    assert not alone.shared
    assert [place.device for place in alone.places] == ["a", "b"]
    study, calls = made(lab, gpus=("a", "b"), jobs=5, without=without)
    assert study.shared
    assert sorted(calls) == sorted([*FIRST, *RUNS, *SAME])


def test_a_run_that_fails_leaves_the_one_beside_it_done(lab: Lab) -> None:
    """The two begin together."""
    with pytest.raises(RuntimeError, match="'dense, seed 1' must end with 0"):
        made(lab, gpus=("0", "1"), FAIL="dense/1")
    _, calls = made(other_lab(lab), gpus=("0", "1"))
    assert "dense/1 40" in calls
    assert "sat/1 40" not in calls
