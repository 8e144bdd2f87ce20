"""What a file may ask for, and what is refused before anything runs."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from megatron_sat.compare.experiment import experiment_from, method_alone, sparse, with_seeds
from tests.compare.studies import GIVEN, experiment


def _changed(path: str, value: Any) -> dict[str, Any]:
    """`GIVEN` with one value changed; ... takes it away."""
    given = deepcopy(GIVEN)
    *parts, last = path.split("/")
    place = given
    for part in parts:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return given


def test_paths_count_from_the_files_folder_and_a_name_is_the_files(tmp_path: Path) -> None:
    found = experiment(tmp_path)
    assert found.name == "made"
    assert found.train == {"zh": (tmp_path / "zh.jsonl",)}
    assert found.model.tokenizer == tmp_path / "tokenizer.model"


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    given = _changed("seeds", ...)
    del given["data"]["new"], given["data"]["old"]
    found = experiment_from(given, folder=tmp_path, name="x")
    assert (found.seeds, found.ranks, found.program, found.old) == ((1,), 1, "pretrain_sat.py", None)
    assert found.target == ["zh", "en"]
    assert found.name == experiment_from(given | {"name": None}, folder=tmp_path, name="x").name == "x"


def test_domains_of_a_language_belong_together(tmp_path: Path) -> None:
    given = _changed("data/valid", {"zh.a": "a", "zh.b": ["b", "c"], "en": "e"})
    found = experiment_from(given, folder=tmp_path, name="x")
    assert found.languages == {"zh": ["zh.a", "zh.b"], "en": ["en"]}
    assert found.target == ["zh.a", "zh.b"]
    assert found.valid["zh.b"] == (tmp_path / "b", tmp_path / "c")


def test_settings_may_be_written_as_flags(tmp_path: Path) -> None:
    given = _changed("variants", {"sat": {"--sat-schedule": "constant", "sat-omission-rate": 0.5}})
    assert list(experiment_from(given, folder=tmp_path, name="x").variants["sat"]) == [
        "sat_schedule",
        "sat_omission_rate",
    ]


@pytest.mark.parametrize("template", ["tokenizer", "alpaca", "plain"])
def test_a_template_is_a_name_or_a_file_beside_this_one(template: str, tmp_path: Path) -> None:
    def asked(data: dict[str, Any]) -> Any:
        given = {**GIVEN, "program": "finetune_sat.py", "data": {**GIVEN["data"], **data}}
        return experiment_from(given, folder=tmp_path, name="x").template

    assert asked({}) == "tokenizer"
    assert asked({"template": template}) == template
    assert asked({"template": f"{template}.jinja"}) == tmp_path / f"{template}.jinja"


def test_other_seeds_leave_the_rest(tmp_path: Path) -> None:
    found = experiment(tmp_path)
    other = with_seeds(found, [7])
    assert other.seeds == (7,)
    assert with_seeds(other, [1, 2]) == found


@pytest.mark.parametrize(
    ("settings", "omits", "alone"),
    [
        ({"sat_schedule": "constant"}, True, True),
        ({"sat_schedule": "constant", "lr": 1}, True, False),
        ({"sat_preset": "paper"}, True, False),  # it sets batch and learning rate
        ({"sat_schedule": "none", "lr": 1}, False, False),
        ({"lr": 1}, False, False),
    ],
)
def test_a_variant_is_known_by_its_settings(settings: dict[str, Any], omits: bool, alone: bool) -> None:
    assert (sparse(settings), method_alone(settings)) == (omits, alone)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("variant", {}, "variant must be a known key; there are name, program, model"),
        ("model/weights", "x", "model: weights must be a known key; there are fresh, checkpoint"),
        ("data", ..., "data must be given, as keys with values, got None"),
        ("training", [], r"training must be given, as keys with values, got \[\]"),
        ("variants", {}, "variants must be given, as keys with values"),
        ("budget/steps", 0, "budget: steps must be a whole number of at least 1, got 0"),
        ("variants/sat", {"init_method_std": 0.01}, "variants: sat: init_method_std has no effect, got 0.01"),
        ("budget/time", "some", "budget: time must be all or settled, got 'some'; choose one"),
        ("budget/ranks", True, "budget: ranks must be a whole number of at least 1, got True"),
        ("model/hf", "m", "model: one of fresh, checkpoint and hf must be given, got fresh and hf"),
        ("model", {"tokenizer": "t"}, "model: one of fresh, checkpoint and hf must be given, got none"),
        ("model/fresh", 3, "model: fresh must hold the model's settings, got 3"),
        ("model/tokenizer", ..., "model: a fresh model must have a tokenizer, got none"),
        ("data/train", {}, r"data: train must name domains with files, got \{\}"),
        ("data/valid", "zh", "data: valid must name domains with files, got 'zh'"),
        ("data/train", {"zh/a": "f"}, "a domain must be LANGUAGE or LANGUAGE.DOMAIN, got 'zh/a'"),
        ("data/train", {"zh": []}, "data: train: zh must have a file, got none"),
        ("data/valid", {"zh": "a", "en": "b", "en.x": "c", "en-x": "d"}, "en_x is there twice; rename one"),
        ("data/old", "de", "data: old must be a language of data: valid, got 'de'; there are zh, en"),
        ("data/new", "de", "data: new must be a language of data: valid, got 'de'"),
        ("data/template", "alpaca", "data: template has no effect with pretrain_sat.py"),
        ("data/template", 3, "data: template must be tokenizer, alpaca, plain or a file of one, got 3; name one"),
        ("program", "train.py", "program must be pretrain_sat.py or finetune_sat.py, got 'train.py'"),
        ("data/new", ["zh"], r"data: new must be a language of data: valid, got \['zh'\]; there are zh, en"),
        ("data/old", {"en": 1}, r"data: old must be a language of data: valid, got \{'en': 1\}"),
        ("data/train", {"zh": 3}, "data: train: zh must be a path, got 3; name one, in quotes where YAML reads"),
        ("data/train", {"zh": ["a", {"b": "c"}]}, r"data: train: zh must be a path, got \{'b': 'c'\}"),
        ("data/valid", {"zh": "a", "en": ""}, "data: valid: en must be a path, got ''"),
        ("data/replay", {"en": [None]}, "data: replay: en must be a path, got None"),
        ("data/train", {"zh": None}, "data: train: zh must have a file, got none"),
        ("model", {"hf": 3}, "model: hf must be a path, got 3; name one"),
        ("model/tokenizer", ["t"], r"model: tokenizer must be a path, got \['t'\]"),
        ("model", {"checkpoint": None}, "model: checkpoint must be a path, got None"),
        ("variants/sat", "fast", "variants: sat must hold settings, as keys with values, got 'fast'; see examples"),
        ("variants/sat", ["lr"], r"variants: sat must hold settings, as keys with values, got \['lr'\]"),
        ("variants/sat", 0, "variants: sat must hold settings, as keys with values, got 0"),
        ("data/replay", {"zh": "r"}, "every data set must have a name of its own, zh is there twice"),
        ("data/train", {"zh.held-out": "a"}, r"zh.held-out is there twice \(what is held out of a domain"),
        ("variants/sat", {"sat-x": 1, "--sat_x": 2}, "sat: sat_x must be set once, got 1 and, as --sat_x, 2"),
        ("training", {"lr": 1, "--lr": 1}, "training: lr must be set once, got 1 and, as --lr, 1; leave one out"),
        ("seeds", [1, 1], r"seeds must be different whole numbers, at least one, got \[1, 1\]"),
        ("seeds", [], "seeds must be different whole numbers, at least one"),
        ("seeds", ["a"], "seeds must be different whole numbers, at least one"),
        ("variants", {"dense_2": {"lr": 1}}, "not begin with dense and not end with rate_0.*got 'dense_2'"),
        ("variants", {"sat_rate_0": {"lr": 1}}, "which are the controls', got 'sat_rate_0'; rename it"),
        ("variants", {"Sat": {"lr": 1}}, "a name must be of a-z, 0-9 and _"),
        ("variants", {"sat": {"lr": 1}, "start": {"lr": 2}}, "not be model, start, training, .* got 'start'; rename"),
        ("variants", {"training": {"lr": 1}}, "under which the settings of all runs are kept, got 'training'"),
        ("variants", {"model": {"lr": 1}}, "under which the settings of all runs are kept, got 'model'"),
        ("variants", {"sat": None}, "variants: sat must set something, it sets nothing"),
        ("training/sat_schedule", "ladder", "training: sat_schedule must stand in a variant"),
        ("training/--train-iters", 3, "training: train_iters is the harness's to set, got 3; use budget"),
        ("training/lr_decay_iters", 3, "training: lr_decay_iters is the harness's to set"),
        ("variants", {"sat": {"seed": 3}}, "sat: seed is the harness's to set, got 3"),
    ],
)
def test_what_cannot_be_compared_is_refused(path: str, value: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        experiment_from(_changed(path, value), folder=tmp_path, name="x")


def test_seeds_of_the_command_line_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seeds must be different whole numbers, at least one, got \[-1\]"):
        with_seeds(experiment(tmp_path), [-1])
