"""The report of a study: what stands first, who is ahead whoever it is, and the same in three forms."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sat.compare.provenance import Provenance
from megatron_sat.compare.requirement import Verdict
from megatron_sat.compare.study import Group, Spread, Study, language_figures
from megatron_sat.compare.summary import (
    cell,
    how_timed,
    in_short,
    settings_of,
    warnings,
    write_summary,
)
from tests.compare.studies import experiment, group, study

TOLD = Provenance(command="tools/compare.py run x.yaml", commit="abc", machine="2 CPU cores", libraries="torch")


def _with(made: Study, *groups: Group, **changes: Any) -> Study:
    return replace(made, groups={**made.groups, **{each.name: each for each in groups}}, **changes)


def test_sentences_say_who_is_ahead_at_equal_time_and_steps_and_how_many_seeds_agree(tmp_path: Path) -> None:
    assert in_short(study(tmp_path)) == [
        (
            "At equal training time, 40.0 s of sat for 100 steps and 40.0 s of dense for 80: on zh_bpc dense_80_steps "
            "is ahead of sat by 0.1082, in 2 of 2 seeds, ± 0.0510 (3.8231 against 3.7149); on en_loss sat is ahead of "
            "dense_80_steps by 0.2000, in 2 of 2 seeds, ± 0.0000 (3.9000 against 4.1000)."
        ),
        (
            "After 100 steps: on zh_bpc dense is ahead of sat by 0.1803, in 2 of 2 seeds, ± 0.0510 (3.8231 against "
            "3.6428); on en_loss sat is ahead of dense by 0.1000, in 2 of 2 seeds, ± 0.0000 (3.9000 against 4.0000)."
        ),
        (
            "A step of sat took 20.0% less time than one of dense and executed 40.0% fewer operations (means over each "
            "run): 1.25 times as fast, where 1.67 times would be proportional to the operations."
        ),
        "sat reached dense's final loss in 0 of 2 seeds.",
        "sat at rate 0 is dense training bit for bit (seed 1).",
    ]


def test_a_study_in_order_has_no_warning(tmp_path: Path) -> None:
    assert warnings(study(tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"left_out": ("dense_equal_time",), "equal_time": {}}, "LEFT OUT on request: the control dense_equal_time"),
        ({"left_out": ("rate_0",), "rate_zero": {}, "differences": {}}, "whether a variant that omits nothing"),
        ({"shared": True}, "RUNS SHARED THE MACHINE: seconds, tokens a second and what follows"),
        ({"differences": {"sat": {1: "loss of step 3"}}}, r"NOT DENSE AT RATE 0: sat \(seed 1\): loss of step 3"),
    ],
)
def test_what_a_reader_must_know_stands_in_the_first_line(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    made = study(tmp_path, **changes)
    (warning,) = warnings(made)
    write_summary(made, tmp_path, told=TOLD, settings={})
    third = (tmp_path / "report.md").read_text().splitlines()[2]
    assert third == f"- {warning}"
    assert re.search(says, warning)


def test_a_variant_that_other_text_judges_is_told(tmp_path: Path) -> None:
    said = warnings(study(tmp_path, evaluated={"dense": (400, 8), "sat": (1600, 16), "sat_rate_0": (400, 8)}))
    (first,) = said
    assert first == (
        "OTHER TEXT JUDGES sat: 1,600 sequences of 16 tokens of each domain, where dense has 400 sequences of 8 "
        "tokens. Their losses do not compare; give all the same eval_iters, global_batch_size and seq_length."
    )


def test_runs_of_different_commits_are_told(tmp_path: Path) -> None:
    other = group(tmp_path / "other", "sat", {"pace": 0.4}, {"pace": 0.4}, commit="def")
    (warning,) = warnings(_with(study(tmp_path), other))
    assert warning.startswith("RUNS ARE OF DIFFERENT COMMITS (abc; def): remove the folders of the older ones")


def test_a_control_with_another_time_is_told_first(tmp_path: Path) -> None:
    slow = group(tmp_path / "slow", "dense_80_steps", {"steps": 80, "pace": 0.6}, {"steps": 80, "pace": 0.6})
    made = _with(study(tmp_path), slow)
    (warning,) = warnings(made)
    assert warning.startswith("UNEQUAL TIME of sat and its control (dense_80_steps): 40.0 s against 48.0 s. Remove")
    assert in_short(made)[0].startswith("At unequal training time (the control took 20.0% more")


def _at_once(made: Study, *counts: tuple[int, ...]) -> Study:
    """Trials of dense were beside as many as counts say, all others beside as many as the first says."""
    trials = made.groups["dense"].trials
    dense = {seed: replace(trial, at_once=count) for (seed, trial), count in zip(trials.items(), counts, strict=True)}
    groups = {
        name: replace(each, trials={seed: replace(trial, at_once=counts[0]) for seed, trial in each.trials.items()})
        for name, each in made.groups.items()
    }
    return replace(made, groups={**groups, "dense": replace(made.groups["dense"], trials=dense)})


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        (((4,), (4,)), "Runs: one per GPU, 4 side by side."),
        (
            ((4,), (1, 4)),
            "Runs: one per GPU, alone or 4 side by side; cores, disk and bus were not shared by equally many.",
        ),
    ],
)
def test_runs_that_had_a_gpu_each_are_said_to_have_stood_side_by_side(
    counts: Sequence[tuple[int, ...]], says: str, tmp_path: Path
) -> None:
    made = _at_once(study(tmp_path), *counts)
    assert how_timed(made) == [says]
    write_summary(made, tmp_path, told=TOLD, settings={})
    assert (tmp_path / "report.md").read_text().splitlines()[2] == f"- {says}"
    assert json.loads((tmp_path / "report.json").read_text())["runs_at_once"] == sorted({n for c in counts for n in c})


def test_runs_that_took_turns_are_said_to_have(tmp_path: Path) -> None:
    says = "Runs took turns: one trained at a time, up to 2 others started up beside it."
    assert how_timed(replace(study(tmp_path), turns=3)) == [says]


def test_nothing_is_said_of_runs_that_were_alone_or_whose_times_mean_nothing(tmp_path: Path) -> None:
    assert how_timed(study(tmp_path)) == []
    assert how_timed(replace(_at_once(study(tmp_path), (4,), (4,)), shared=True)) == []


def test_settled_times_are_said_to_be(tmp_path: Path) -> None:
    made = study(tmp_path)
    made = replace(made, experiment=replace(made.experiment, time="settled"))
    assert how_timed(made) == [
        "Times are settled: of each rate's first records, only what the others of that rate took counts."
    ]


def test_rate_zero_may_differ_where_more_than_the_method_is_set(tmp_path: Path) -> None:
    asked = experiment(tmp_path, variants={"sat": {"sat_schedule": "constant", "sat_omission_rate": 0.5, "lr": 1}})
    made = study(tmp_path, experiment=asked, differences={"sat": {1: "loss of step 1", 2: None}})
    assert warnings(made) == []
    said = "sat at rate 0 is not dense training, and need not be, for it sets more than the method: loss of step 1."
    assert in_short(made)[-1] == said


def test_a_variant_without_a_schedule_is_said_to_have_no_control_at_rate_zero(tmp_path: Path) -> None:
    asked = experiment(tmp_path, variants={"sat": {"lr": 1}})
    made = study(tmp_path, experiment=asked, rate_zero={}, differences={})
    assert in_short(made)[-1] == "sat has no schedule of omission, so it has no control at rate 0."


def test_runs_that_reach_denses_loss_say_when(tmp_path: Path) -> None:
    better = group(tmp_path / "better", "sat", {"zh": 4.0, "pace": 0.4}, {"zh": 4.0, "pace": 0.4})
    assert "sat reached dense's final loss after 31.6 s; dense took 50.0 s in all." in in_short(
        _with(study(tmp_path), better)
    )


def test_one_seed_and_level_and_diverged_runs_are_called_so(tmp_path: Path) -> None:
    made = study(tmp_path)
    level = group(tmp_path / "level", "sat", {"zh": 5.1001, "en": math.nan, "pace": 0.4})
    said = in_short(_with(made, level))
    assert "on zh_bpc sat and dense_80_steps are level" in said[0]
    assert "on en_loss a run diverged (nan against 4.1000)" in said[0]
    assert "on zh_bpc dense is ahead of sat by 0.0722, of one seed" in said[1]


def test_seeds_that_disagree_are_counted(tmp_path: Path) -> None:
    split = group(tmp_path / "split", "sat", {"zh": 4.9, "pace": 0.4}, {"zh": 5.4, "pace": 0.4})
    assert "dense is ahead of sat by 0.0721, in 1 of 2 seeds" in in_short(_with(study(tmp_path), split))[1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({1: 2.5}, "2.500"),
        ({1: 2.5, 2: 3.5}, "3 ± 0.707"),
        ({1: 100.0, 2: 100.0}, "100"),
        ({1: 12345.5}, "1.235e+04"),
        ({1: 1.0, 2: math.inf}, "never"),
        ({1: 1.0, 2: math.nan}, "diverged"),
    ],
)
def test_a_cell_says_mean_and_deviation(values: dict[int, float], said: str) -> None:
    assert cell(Spread(values=values), digits=3) == said


def test_what_a_group_lacks_is_an_empty_cell() -> None:
    assert cell(None, digits=3) == ""


def test_languages_are_compared_in_bits_where_their_text_was_counted(tmp_path: Path) -> None:
    assert language_figures(study(tmp_path)) == ["zh_bpc", "en_loss"]


def test_the_report_holds_tables_seeds_settings_and_its_picture(tmp_path: Path) -> None:
    verdict = Verdict(text="sat.zh_bpc <= 1", holds=False, left=3.8, right=1.0)
    write_summary(study(tmp_path), tmp_path, told=TOLD, settings={"steps": 100}, verdicts=[verdict])
    page = (tmp_path / "report.md").read_text()
    assert "| NO | `sat.zh_bpc <= 1` | 3.8 | 1 |" in page
    assert "|  | dense | sat | sat_rate_0 | dense_80_steps (the time of sat) |" in page
    assert "| zh_loss | 5.0500 ± 0.0707 | 5.3000 ± 0.1414 | 5 | 5.1500 ± 0.0707 |" in page
    assert "| seconds_to_dense | 50 | never | 50 | never |" in page
    assert "| sat | 2 | 3.8953 | 40 | 100 |" in page
    assert '"steps": 100' in page
    assert "No run read a text twice" in page
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 1
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_text_that_was_read_again_is_told(tmp_path: Path) -> None:
    write_summary(study(tmp_path, passes={"dense": 1.5, "sat": 1.5}), tmp_path, told=TOLD, settings={})
    page = (tmp_path / "report.md").read_text()
    assert "read more than once (passes of the most-read domain: dense 1.50, sat 1.50)" in page


def test_the_report_for_programs_has_every_number(tmp_path: Path) -> None:
    missing = Verdict(text="sat.zh_bpc <= 1", holds=False, left=math.nan, right=1.0, doubt="sat has no zh_bpc")
    write_summary(study(tmp_path), tmp_path, told=TOLD, settings={"steps": 100}, verdicts=[missing])
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert "| NO: sat has no zh_bpc | `sat.zh_bpc <= 1` | nan | 1 |" in (tmp_path / "report.md").read_text()
    assert [(each["left"], each["right"], each["doubt"]) for each in found["required"]] == [(None, 1.0, missing.doubt)]
    assert found["figures"]["sat"]["zh_loss"]["seeds"] == {"1": 5.2, "2": 5.4}
    assert found["figures"]["sat"]["seconds_to_dense"]["mean"] is None
    assert found["rate_zero"] == {"sat": {"1": None}}
    last = found["curves"]["sat"]["1"][-1]
    assert (last["step"], last["seconds"], last["zh_loss"]) == (100, 40.0, 5.2)
    assert found["settings"] == {"steps": 100}


def test_settings_are_plain_and_paths_are_said_as_asked(tmp_path: Path) -> None:
    found = settings_of(experiment(tmp_path), named=lambda path: path.name)
    assert found["train"] == {"zh": ["zh.jsonl"]}
    assert found["seeds"] == [1, 2]
    assert found["model"]["tokenizer"] == "tokenizer.model"
