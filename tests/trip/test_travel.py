"""A trip over all stages with tools that only pretend: the order, what is kept, what goes on, what is done again."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sat.compare.stages import Runner
from megatron_sat.compare.workshop import Workshop
from megatron_sat.trip.course import Course
from megatron_sat.trip.findings import read_findings
from megatron_sat.trip.settings import Settings
from megatron_sat.trip.text import find_text
from megatron_sat.trip.travel import rehearse, travel

FAKE = Path(__file__).parent / "fake_tools.py"
FIRST = ["evaluate original", "vocabulary", "import", "text", "evaluate extended"]
TRAINED = ["train dense 30", "train sat 30", "train control 15"]
LAST = ["export", "evaluate SAT", "evaluate dense", "evaluate dense for SAT's time", "evaluate exported"]


@pytest.fixture
def course(tmp_path: Path) -> Course:
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} -S {FAKE} "$@"\n')
    interpreter.chmod(0o755)
    for name in ("zh/a.train", "zh/a.dev", "en/a.train", "en/a.dev", "en/b.train"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("")
    (tmp_path / "training.yaml").write_text("")
    (tmp_path / "smol").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "smol" / name).write_text("{}")
    return Course(
        shop=Workshop(root=tmp_path, python=str(interpreter), made_with="here", cores=4, jobs=1),
        settings=Settings(steps=30, add=10, seq_length=8),
        training=tmp_path / "training.yaml",
        text=find_text(tmp_path / "data"),
        model=tmp_path / "smol",
        before=(),
        out=tmp_path / "out",
    )


def _go(course: Course, *, fail: str = "") -> list[str]:
    """The calls of this trip."""
    calls = course.shop.root / "calls"
    calls.write_text("")
    environment = os.environ | {"CALLS": str(calls), "FAIL": fail}
    runner = Runner(
        environment=environment, shown=lambda line: False, working_folder=course.shop.root, jobs=course.shop.jobs
    )
    try:
        travel(course, runner)
    finally:
        said = calls.read_text().splitlines()
    return said


def _again(course: Course, **changes: object) -> Course:
    return replace(course, settings=replace(course.settings, **changes))  # type: ignore[arg-type]


def test_all_stages_run_in_order_and_the_control_fills_sats_time(course: Course) -> None:
    """Its steps take twice as long as SAT's."""
    assert _go(course) == FIRST + TRAINED + LAST


def test_what_is_done_is_kept(course: Course) -> None:
    _go(course)
    assert _go(_again(course)) == []


def test_stages_at_once_do_the_same_and_training_is_alone(course: Course) -> None:
    said = _go(replace(course, shop=replace(course.shop, jobs=3)))
    assert sorted(said) == sorted(FIRST + TRAINED + LAST)
    assert said[5:8] == TRAINED
    assert said.index("vocabulary") < min(map(said.index, ("import", "text", "evaluate extended")))
    assert said.index("export") < said.index("evaluate exported")


@pytest.mark.parametrize("place", ["vocabulary", "train sat", "exported"])
def test_a_trip_that_fails_goes_on_where_it_was(place: str, course: Course) -> None:
    with pytest.raises(RuntimeError, match="must end with 0.*(?s:.*)fails as it was told to"):
        _go(course, fail=place)
    whole = FIRST + TRAINED + LAST
    missing = whole[next(number for number, said in enumerate(whole) if place in said) :]
    assert _go(_again(course)) == missing


def test_another_omission_rate_trains_sat_again_and_what_follows_from_it(course: Course) -> None:
    _go(course)
    assert _go(_again(course, omission_rate="0.25")) == ["train sat 30", "export", "evaluate SAT", "evaluate exported"]


def test_other_pieces_leave_nothing_but_the_originals_evaluation(course: Course) -> None:
    _go(course)
    assert _go(_again(course, add=11)) == FIRST[1:] + TRAINED + LAST


def test_another_length_of_evaluation_trains_nothing_again(course: Course) -> None:
    _go(course)
    evaluations = [said for said in FIRST + LAST if said.startswith("evaluate")]
    assert _go(_again(course, max_characters=7)) == evaluations


def test_other_settings_of_training_train_again(course: Course) -> None:
    _go(course)
    course.training.write_text("lr: 1")
    assert _go(_again(course)) == TRAINED + LAST


def test_another_model_under_the_same_name_is_noticed(course: Course) -> None:
    _go(course)
    (course.model / "model.safetensors").write_text("other")
    assert _go(_again(course)) == FIRST + TRAINED + LAST


def test_an_interrupted_run_that_saved_goes_on_from_its_checkpoint(course: Course) -> None:
    resumable = _again(course, resumable=True)
    with pytest.raises(RuntimeError, match="'SAT' must end with 0"):
        _go(resumable, fail="train sat")
    assert _go(_again(resumable))[0] == "train sat 30 going on"


def test_without_checkpoints_on_its_way_it_begins_anew(course: Course) -> None:
    with pytest.raises(RuntimeError, match="'SAT' must end with 0"):
        _go(course, fail="train sat")
    assert _go(_again(course))[0] == "train sat 30"


def test_every_command_can_be_said_without_running_one(course: Course, capsys: pytest.CaptureFixture[str]) -> None:
    rehearse(course)
    said = capsys.readouterr().out
    for tool in ("evaluate.py", "extend_vocab.py", "convert_checkpoint.py import", "pretrain_sat.py", ".prepare"):
        assert tool in said
    assert "--sat-schedule ladder" in said and "--replay-share 0.2" in said
    assert "dense for SAT's time's --train-iters follow from the time that SAT takes" in said
    assert not course.out.exists()


def test_findings_are_what_the_stages_left(course: Course) -> None:
    _go(course)
    found = read_findings(course, [course.dense])
    assert [result.name for result in found.results] == ["original", "extended", "SAT", "dense", "dense for SAT's time"]
    assert found.tokens == {"zh": (10, 5), "en": (20, 10)}
    assert found.comparison.challenges[0].control.steps == 15
    assert found.export_is_equal
    assert found.vocabulary["new_tokens"] == 10


def test_missing_text_is_noticed(course: Course) -> None:
    _go(course)
    (course.tokens.folder / "data" / "zh.a.json").unlink()
    with pytest.raises(ValueError, match="must hold zh.a, it does not; run it again"):
        read_findings(course, [])


def test_training_text_is_blended_by_domain_and_english_is_replayed(course: Course) -> None:
    command = " ".join(course.dense.command)
    assert "--train-data-path zh.a=out/text/data/zh.a --replay" in command
    assert "--replay-data-path en.a=out/text/data/en.a en.b=out/text/data/en.b --replay-share" in command
    assert "--config out/import/model/model.yaml training.yaml" in command
