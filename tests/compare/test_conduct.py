"""A comparison over all stages with programs that only pretend: order, what is kept, shared, left out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sat.compare.conduct import equal_time_steps
from megatron_sat.compare.experiment import OF_ALL
from megatron_sat.compare.lab import Lab
from tests.compare.pretended import (
    CONTROLS,
    FIRST,
    RUNS,
    SAME,
    SAT,
    TRAINING,
    calls_of,
    conduct_of,
    lab_in,
    made,
    other_lab,
)
from tests.compare.studies import GIVEN
from tests.compare.synthetic import run


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return lab_in(tmp_path)


def test_runs_come_seed_by_seed_and_the_control_fills_the_variants_time(lab: Lab) -> None:
    """A dense step takes twice as long as a sparse one."""
    study, calls = made(lab, reads=True)
    assert calls == FIRST + RUNS + CONTROLS + SAME
    assert study.equal_time == {"sat": "dense_20_steps"}
    assert study.differences == {"sat": {1: None}}
    assert list(study.groups) == ["dense", "sat", "sat_rate_0", "dense_20_steps"]
    assert study.evaluated == {"dense": (100, 8), "sat": (100, 8), "sat_rate_0": (100, 8)}


def test_what_judges_a_variant_is_that_of_its_own_settings(lab: Lab) -> None:
    more = {**SAT, "eval_iters": 3, "global_batch_size": 2}
    study, _ = made(other_lab(lab, variants={"sat": SAT, "more": more}), reads=True)
    assert study.evaluated["more"] == study.evaluated["more_rate_0"] == (6, 8)
    assert study.evaluated["dense"] == (100, 8)


@pytest.mark.parametrize(("time", "steps", "seconds"), [("all", 30, 30.0), ("settled", 20, 20.0)])
def test_what_a_variants_first_steps_take_longer_counts_or_not(lab: Lab, time: str, steps: int, seconds: float) -> None:
    study, _ = made(other_lab(lab, budget={"steps": 40, "time": time}), BEGINS="10")
    assert study.equal_time == {"sat": f"dense_{steps}_steps"}
    assert study.figures["sat"]["seconds"].mean == pytest.approx(seconds)


def test_what_is_done_is_kept(lab: Lab) -> None:
    first, _ = made(lab)
    again, calls = made(other_lab(lab))
    assert calls == []
    assert again.figures == first.figures


def test_figures_are_those_of_the_runs(lab: Lab) -> None:
    study, _ = made(lab)
    assert study.figures["sat"]["zh_loss"].values == {1: pytest.approx(9.7), 2: pytest.approx(9.8)}
    assert study.figures["sat"]["forgetting_loss"].mean == pytest.approx(1 - 0.39)
    assert study.tokens_per_character == {"zh": 0.5, "en": 0.5}
    assert study.passes["sat"] == 0.25
    assert study.commits == ("abc",)


def test_variants_whose_controls_have_equally_many_steps_share_one(lab: Lab) -> None:
    twice = other_lab(lab, variants={"sat": SAT, "top": {**SAT, "sat_selection": "top-k"}})
    study, calls = made(twice)
    assert study.equal_time == {"sat": "dense_20_steps", "top": "dense_20_steps"}
    assert [call for call in calls if call.startswith("dense_")] == CONTROLS


def test_a_variant_that_takes_denses_time_has_dense_for_its_control(lab: Lab) -> None:
    study, calls = made(lab, PACE="1")
    assert study.equal_time == {"sat": "dense"}
    assert not any(call.startswith("dense_") for call in calls)


def test_a_variant_that_is_slower_gives_its_control_more_steps(lab: Lab) -> None:
    study, _ = made(lab, PACE="1.5")
    assert study.groups[study.equal_time["sat"]].steps == 60


def test_rate_zero_that_need_not_be_dense_is_run_with_every_seed(lab: Lab) -> None:
    study, calls = made(other_lab(lab, variants={"sat": {**SAT, "lr": 2e-3}}))
    assert [call for call in calls if "rate_0" in call and "same" not in call] == ["sat_rate_0/1 40", "sat_rate_0/2 40"]
    assert set(study.differences["sat"]) == {1, 2}


def test_a_variant_that_omits_nothing_has_no_control_at_rate_zero(lab: Lab) -> None:
    study, calls = made(other_lab(lab, variants={"faster": {"lr": 2e-3}}))
    assert not any("rate_0" in call for call in calls)
    assert study.rate_zero == {}


def test_rate_zero_that_is_not_dense_is_told(lab: Lab) -> None:
    study, _ = made(lab, BROKEN="1")
    assert study.differences == {"sat": {1: "loss of step 1"}}


@pytest.mark.parametrize(("removed", "again"), [("sat_rate_0", RUNS[2:3]), ("dense", [RUNS[0], RUNS[3]])])
def test_runs_that_were_removed_and_made_again_are_compared_again(removed: str, again: list[str], lab: Lab) -> None:
    """The commands are those of before; what was wrong at rate 0 is mended."""
    made(lab, BROKEN="1")
    shutil.rmtree(lab.out / "runs" / removed)
    study, calls = made(other_lab(lab))
    assert calls == [*again, *SAME]
    assert study.differences == {"sat": {1: None}}


@pytest.mark.parametrize("place", ["text", "start/1", "sat/1", "dense_20_steps/2", "same"])
def test_a_comparison_that_fails_goes_on_where_it_was(place: str, lab: Lab) -> None:
    with pytest.raises(RuntimeError, match="must end with 0.*(?s:.*)fails as it was told to"):
        made(lab, FAIL=place)
    done = len(calls_of(lab)) - 1
    _, calls = made(other_lab(lab))
    assert calls == (FIRST + RUNS + CONTROLS + SAME)[done:]


def test_a_run_that_saves_on_its_way_goes_on_from_there(lab: Lab) -> None:
    saving = other_lab(lab, training={**TRAINING, "save_interval": 10, "log_interval": 5})
    with pytest.raises(RuntimeError, match="'sat, seed 1' must end with 0"):
        made(saving, FAIL="sat/1")
    _, calls = made(replace(saving))
    assert calls[0] == "sat/1 40 going on"


@pytest.mark.parametrize(
    ("training", "goes_on"),
    [
        ({"save_interval": 10, "log_interval": 5}, True),
        ({"save_interval": 10, "log_interval": 4}, False),
        ({"save_interval": 5}, False),  # records are 100 steps apart
        ({"save_interval": 5, "log_interval": 0}, True),  # which the program refuses, with its own words
        ({"save_interval": 10, "log_interval": 5, "save_optim": False}, False),
        ({"save_interval": "50", "log_interval": "10"}, True),
        ({"save_interval": "often"}, False),
    ],
)
def test_a_run_that_saves_between_two_records_begins_anew(training: dict[str, Any], goes_on: bool, lab: Lab) -> None:
    """Going on it would have another record than the run beside it, and be called another one."""
    given = other_lab(lab, training={**TRAINING, **training})
    (planned, *_) = conduct_of(given)._first()["sat"]
    assert (given.run(planned).resumption is not None) == goes_on


def test_a_variant_that_changed_is_run_again_and_dense_is_kept(lab: Lab) -> None:
    made(lab)
    _, calls = made(other_lab(lab, variants={"sat": {**SAT, "sat_omission_rate": 0.25}}))
    assert calls == ["sat/1 40", "sat/2 40"]


def test_other_training_makes_every_run_again(lab: Lab) -> None:
    made(lab)
    _, calls = made(other_lab(lab, training={**TRAINING, "lr": 1e-4}))
    assert calls == RUNS + CONTROLS + SAME  # the start has no learning rate


def test_another_seed_is_added_to_what_is_there(lab: Lab) -> None:
    made(lab)
    _, calls = made(other_lab(lab, seeds=[1, 2, 3]))
    assert calls == ["start/3 1", "dense/3 40", "sat/3 40", "dense_20_steps/3 20"]


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        (("dense_equal_time",), CONTROLS),
        (("rate_0",), [*RUNS[2:3], *SAME]),
        (("dense", "dense_equal_time", "rate_0"), [RUNS[0], RUNS[2], RUNS[3], *CONTROLS, *SAME]),
    ],
)
def test_a_control_can_be_left_out_and_the_study_says_so(
    without: tuple[str, ...], missing: list[str], lab: Lab
) -> None:
    study, calls = made(lab, without=without)
    assert [call for call in FIRST + RUNS + CONTROLS + SAME if call not in missing] == calls
    assert study.left_out == without


def test_controls_that_others_are_measured_by_stay(lab: Lab) -> None:
    with pytest.raises(ValueError, match="dense takes from dense_equal_time and rate_0 what they are measured by"):
        conduct_of(lab, without=("dense",))
    with pytest.raises(ValueError, match="must be one of dense, dense_equal_time, rate_0, got sat; choose one"):
        conduct_of(lab, without=("sat",))


def test_runs_share_the_machine_only_where_no_time_is_compared(lab: Lab) -> None:
    alone, _ = made(lab, jobs=2)
    assert not alone.shared
    beside, calls = made(other_lab(lab), jobs=2, without=("dense_equal_time",))
    assert beside.shared
    assert sorted(calls) == sorted([*RUNS, *SAME])  # what ran alone is not what runs beside others
    _, calls = made(other_lab(lab))
    assert set(RUNS) < set(calls)


def test_a_setting_that_no_run_can_have_is_refused_before_any_run(lab: Lab) -> None:
    wrong = other_lab(lab, variants={"sat": SAT, "typo": {**SAT, "sat_importanse": "uniform"}})
    with pytest.raises(ValueError, match="typo must be a run that pretrain_sat.py can make: .*sat-importanse"):
        made(wrong, reads=True)
    assert calls_of(wrong) == ["text"]


def test_a_start_has_nothing_to_go_back_to_and_does_not_ask_for_it(lab: Lab) -> None:
    """A run of one update saves nothing on its way; all others go back to what they saved."""
    safe = {**TRAINING, "save_interval": 5, "on_bad_step": "rollback", "max_bad_steps": 3}
    study, _ = made(other_lab(lab, training=safe), reads=True)
    assert study.differences == {"sat": {1: None}}
    kept = {path.stem: json.loads(path.read_text()) for path in (lab.out / "settings").iterdir()}
    assert {"on_bad_step", "max_bad_steps", "save_interval"} & set(kept["start"]) == set()
    assert kept["training"] == safe


def test_a_start_that_cannot_be_made_is_refused_before_it_is_tried(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sat.compare.lab._OF_LONGER_RUNS", ("lr", "save_"))
    wrong = other_lab(lab, training={**TRAINING, "save_interval": 5, "on_bad_step": "rollback"})
    with pytest.raises(ValueError, match=r"start must be a run that pretrain_sat.py can make: --on-bad-step rollback"):
        made(wrong, reads=True)
    assert calls_of(wrong) == ["text"]


def test_every_command_can_be_said_without_running_one(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    conduct_of(lab).rehearse()
    said = capsys.readouterr().out
    assert said.count("pretrain_sat.py") == 7
    assert "then, for each of sat, dense with the steps that fit into its measured time, 2 seeds each" in said
    assert calls_of(lab) == []
    assert "training runs: " not in said
    conduct_of(lab, without=("dense_equal_time",), gpus=("4", "5")).rehearse()
    said = capsys.readouterr().out
    assert "then, for each" not in said
    assert "training runs: 2 at once, on the GPUs 4, 5" in said


def test_no_variant_may_be_called_as_the_settings_of_all_runs_are(lab: Lab) -> None:
    """Its file of settings would take their place."""
    conduct_of(lab).rehearse()
    assert {path.stem for path in (lab.out / "settings").iterdir()} == {*OF_ALL, "sat", "sat_rate_0"}


def test_conversations_are_prepared_each_by_itself_and_have_no_bits(lab: Lab) -> None:
    data = {**GIVEN["data"], "template": "alpaca"}
    tuned = other_lab(lab, program="finetune_sat.py", data=data)
    study, calls = made(tuned, reads=True)
    assert calls[:3] == ["prepare zh", "prepare zh.held-out", "prepare en.held-out"]
    assert study.tokens_per_character == {}
    assert "--template alpaca" in " ".join(tuned.texts[0].command)


def test_the_controls_steps_are_those_of_the_mean_time_at_each_runs_pace(tmp_path: Path) -> None:
    dense = [run(tmp_path, "a", pace=0.5), run(tmp_path, "b", pace=1.0)]
    variant = [run(tmp_path, "c", pace=0.2), run(tmp_path, "d", pace=0.4)]  # 30 s: 60 steps of one, 30 of the other
    assert equal_time_steps(dense, variant) == 45


def test_dense_training_of_other_lengths_is_made_and_shared_with_a_control_of_as_many(lab: Lab) -> None:
    longer = other_lab(lab, budget={"steps": 40, "dense_steps": [10, 20]})
    study, calls = made(longer)
    assert study.equal_time == {"sat": "dense_20_steps"}
    assert [call for call in calls if call.startswith(("dense/1", "dense_"))] == [
        *("dense/1 40", "dense_10_steps/1 10", "dense_20_steps/1 20", "dense_10_steps/2 10", "dense_20_steps/2 20"),
    ]
    with pytest.raises(ValueError, match=r"--without-control dense leaves out what budget: dense_steps asks for"):
        conduct_of(longer, without=("dense", "dense_equal_time", "rate_0"))
