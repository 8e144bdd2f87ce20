"""What the stages of a comparison read, and so when they are made again: models, tokenizers, templates, text."""

from pathlib import Path

import pytest

from megatron_sat.compare.lab import Lab
from tests.compare.pretended import MODEL, calls_of, conduct_of, lab_in, made, other_lab
from tests.compare.studies import GIVEN


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return lab_in(tmp_path)


@pytest.mark.parametrize(
    ("template", "tokenizer", "changed", "again"),
    [
        ("chat.jinja", "folder", "chat.jinja", True),
        ("tokenizer", "folder", "folder/chat_template.jinja", True),
        ("tokenizer", "folder", "folder/tokenizer_config.json", True),
        ("alpaca", "folder", "folder/tokenizer.json", True),
        ("alpaca", "tokenizer.model", "tokenizer.model", True),
        ("alpaca", "folder", "folder/chat_template.jinja", False),
        ("chat.jinja", "folder", "folder/chat_template.jinja", False),
    ],
)
def test_conversations_are_prepared_again_when_template_or_tokenizer_changed(
    template: str, tokenizer: str, changed: str, again: bool, lab: Lab
) -> None:
    (lab.shop.root / "folder").mkdir()
    for name in ("chat.jinja", "folder/chat_template.jinja", "folder/tokenizer.json", "folder/tokenizer_config.json"):
        (lab.shop.root / name).write_text("as it was")

    def keys() -> list[str]:
        model, data = {"fresh": MODEL, "tokenizer": tokenizer}, {**GIVEN["data"], "template": template}
        return [stage.key for stage in other_lab(lab, program="finetune_sat.py", model=model, data=data).texts]

    before = keys()
    assert keys() == before
    (lab.shop.root / changed).write_text("another")
    assert [one != other for one, other in zip(before, keys(), strict=True)] == 3 * [again]


def test_a_file_of_a_template_is_one_beside_the_experiments(lab: Lab) -> None:
    """Commands run in the project's folder, where another one may have its name."""
    data = {**GIVEN["data"], "template": "../chat.jinja"}
    tuned = other_lab(lab, program="finetune_sat.py", data=data)
    assert f"--template {lab.shop.root.parent / 'chat.jinja'} --" in " ".join(tuned.texts[0].command)
    with pytest.raises(ValueError, match=r"chat.jinja must be a file that can be read: No such file.*check the path"):
        made(tuned)


def test_a_hugging_face_model_is_imported_and_every_run_begins_with_it(lab: Lab) -> None:
    folder = lab.shop.root / "smol"
    folder.mkdir()
    (folder / "model.safetensors").write_text("x")
    given = other_lab(lab, model={"hf": "smol"})
    conduct = conduct_of(given)
    conduct.prepare()
    assert calls_of(given) == ["import", "text"]
    begin = "--load out/import/model --finetune"
    first = given.start(1)
    assert begin in " ".join(first.command)
    assert "--log-jsonl out/start/seed-1/metrics.jsonl" in " ".join(first.command)
    (planned, *_) = conduct._first()["sat"]
    assert begin in " ".join(given.run(planned).command)
    before = given.run(planned).key
    (folder / "model.safetensors").write_text("other")
    assert other_lab(lab, model={"hf": "smol"}).run(planned).key != before


def test_prepared_data_is_taken_as_it_is_and_noticed_when_it_changes(lab: Lab) -> None:
    for name in ("a", "b", "c"):
        for ending in (".idx", ".bin"):
            (lab.shop.root / (name + ending)).write_text("")
    parts = {"train": {"zh": "a"}, "valid": {"zh": "b", "en": "c"}}
    given = other_lab(lab, data=parts)
    assert given.texts == ()
    assert "--train-data-path zh=a --valid-data-path zh=b en=c" in " ".join(given.start(1).command)
    before = given.start(1).key
    (lab.shop.root / "a.bin").write_text("other")
    assert other_lab(lab, data=parts).start(1).key != before


def test_text_for_a_checkpoint_needs_a_tokenizer(lab: Lab) -> None:
    given = other_lab(lab, model={"checkpoint": "imported"})
    with pytest.raises(ValueError, match="must come with a tokenizer where text is to be prepared, got none"):
        made(given)
    named = other_lab(lab, model={"checkpoint": "imported", "tokenizer": "tokenizer.model"})
    assert "--config imported/model.yaml out/settings/start.yaml" in " ".join(named.start(1).command)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["tokenizer.model"], "SentencePieceTokenizer --tokenizer-model folder/tokenizer.model"),
        (["tokenizer.model", "tokenizer.json"], "HuggingFaceTokenizer --tokenizer-model folder"),
    ],
)
def test_a_folders_tokenizer_is_read_as_its_files_ask(files: list[str], said: str, lab: Lab) -> None:
    (lab.shop.root / "folder").mkdir()
    for name in files:
        (lab.shop.root / "folder" / name).write_text("")
    given = other_lab(lab, program="finetune_sat.py", model={"fresh": MODEL, "tokenizer": "folder"})
    assert f"--tokenizer-type {said} --workers" in " ".join(given.texts[0].command)


def test_several_ranks_are_started_by_torchrun(lab: Lab) -> None:
    given = other_lab(lab, budget={"steps": 40, "ranks": 2})
    command = " ".join(given.start(1).command)
    assert "--nproc-per-node 2 -m megatron_sat.compare.measured --into out/start/seed-1 pretrain_sat.py" in command
