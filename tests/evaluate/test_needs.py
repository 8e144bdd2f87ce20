"""What tasks need is read off an index as lm-eval makes it: tasks, tags, groups, groups in groups, inline members."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sat.evaluate.needs import Need, needs_of


def entry(kind: str, *, tags: set[str] | None = None, **settings: Any) -> SimpleNamespace:
    return SimpleNamespace(kind=SimpleNamespace(name=kind), cfg=settings, tags=tags or set())


INDEX = {
    "plain": entry("TASK", task="plain", dataset_path="org/plain", dataset_name="main"),
    "other": entry("TASK", task="other", dataset_path="org/other", unsafe_code=True),
    "own": entry("TASK", task="own", dataset_path="org/own", custom_dataset="!function"),
    "classy": entry("PY_TASK", task="classy", **{"class": "!function"}),
    "old": entry("TASK", task="old", dataset_path="org/old", dataset_kwargs={"trust_remote_code": True, "split": "a"}),
    "some": entry("TAG", tags={"plain", "other"}),
    "group": entry("GROUP", group="group", task=["plain", "some", {"task": "other", "dataset_name": "changed"}]),
    "outer": entry(
        "GROUP",
        group="outer",
        dataset_name="of the group",
        task=[{"group": "group"}, {"group": "new", "task": ["plain"]}, {"task": "unlisted", "dataset_path": "org/new"}],
    ),
    "nameless": entry("GROUP", group="nameless", task=[{"dataset_path": "org/prompted"}]),
}


def told(name: str) -> list[tuple[str, str | None, str | None]]:
    return [(need.task, need.dataset, need.configuration) for need in needs_of(name, index=INDEX)]


def test_a_task_needs_its_own_data() -> None:
    assert needs_of("plain", index=INDEX) == [
        Need(asked="plain", task="plain", dataset="org/plain", configuration="main", arguments={}, runs_answers=False)
    ]


def test_a_tag_stands_for_the_tasks_that_bear_it() -> None:
    assert told("some") == [("other", "org/other", None), ("plain", "org/plain", "main")]


def test_a_member_s_settings_count_before_its_file_s() -> None:
    assert told("group")[-1] == ("other", "org/other", "changed")
    assert len(told("group")) == 4


def test_a_group_speaks_for_its_members_all_the_way_down() -> None:
    found = told("outer")
    assert [task for task, _, _ in found] == ["plain", "other", "plain", "other", "plain", "unlisted"]
    assert {name for _, _, name in found} == {"of the group", "changed"}
    assert found[-1] == ("unlisted", "org/new", "of the group")
    assert {need.asked for need in needs_of("outer", index=INDEX)} == {"outer"}


def test_a_member_without_a_name_goes_by_its_data_set() -> None:
    assert told("nameless") == [("org/prompted", "org/prompted", None)]


@pytest.mark.parametrize("task", ["own", "classy"])
def test_data_that_a_task_s_code_makes_are_not_looked_for(task: str) -> None:
    assert told(task) == [(task, None, None)]


def test_what_datasets_no_longer_takes_is_left_out() -> None:
    (need,) = needs_of("old", index=INDEX)
    assert need.arguments == {"split": "a"}


def test_a_task_that_runs_answers_says_so() -> None:
    assert [need.runs_answers for need in needs_of("some", index=INDEX)] == [True, False]


@pytest.mark.parametrize(
    ("dataset", "arguments", "local"),
    [
        ("json", {"data_files": {"test": "items.jsonl"}}, True),
        ("json", {"data_files": "https://host.invalid/items.jsonl"}, False),
        ("org/name", {"data_files": "items.jsonl"}, False),
        ("org/name", {}, False),
        (None, {}, False),
    ],
)
def test_files_are_told_from_the_hub_s_data_sets(dataset: str | None, arguments: dict[str, Any], local: bool) -> None:
    need = Need(asked="a", task="a", dataset=dataset, configuration=None, arguments=arguments, runs_answers=False)
    assert need.is_local is local


def test_a_folder_is_local(tmp_path: Path) -> None:
    need = Need(asked="a", task="a", dataset=str(tmp_path), configuration=None, arguments={}, runs_answers=False)
    assert need.is_local
