"""What the tasks of lm-eval need, read off its index: nothing is loaded and nothing fetched.

lm-eval's own way to learn it is to load a task together with its data, one after the other, until one is missing. Its
index maps a name to an entry with a kind, its file's settings (includes merged), and for a tag the names that bear it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Need:
    """One task and its data."""

    asked: str
    """The name that was asked for: this task, or a group or tag that it belongs to."""
    task: str
    dataset: str | None
    """A data set of the hub, a kind of file ("json"), a folder, or None: the task's own code makes its data."""
    configuration: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    """What else is handed to datasets: files, folders, a revision."""
    runs_answers: bool
    """Whether the task executes what the model writes."""

    @property
    def is_local(self) -> bool:
        """Whether the data lie in files that the task names."""
        if self.dataset is None or "://" in str(self.arguments):
            return False
        return Path(self.dataset).is_dir() or ("/" not in self.dataset and "data_files" in self.arguments)


def needs_of(asked: str, *, index: Mapping[str, Any]) -> list[Need]:
    """The tasks behind a name of the index, groups and tags followed to their ends."""
    return list(_follow(asked, {}, asked=asked, index=index))


def _follow(name: str, changes: Mapping[str, Any], *, asked: str, index: Mapping[str, Any]) -> Iterator[Need]:
    """The tasks behind ``name``, whose settings ``changes`` overrides: a group may speak for its members."""
    entry = index.get(name)
    if entry is None:  # a task that exists in its group's file alone
        yield _need({"task": name, **changes}, asked=asked)
    elif entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _follow(member, changes, asked=asked, index=index)
    elif entry.kind.name == "GROUP":
        yield from _members(entry.cfg, changes, asked=asked, index=index)
    else:
        yield _need({**(entry.cfg or {}), **changes, "task": name}, asked=asked)


_GROUP_FIELDS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "include"}
"""Of a group's file, what is about the group and not handed on to its members."""


def _members(
    group: Mapping[str, Any], changes: Mapping[str, Any], *, asked: str, index: Mapping[str, Any]
) -> Iterator[Need]:
    inherited = {key: value for key, value in group.items() if key not in _GROUP_FIELDS} | dict(changes)
    members: Sequence[str | Mapping[str, Any]] = group["task"] if isinstance(group.get("task"), list) else ()
    for member in members:
        if isinstance(member, str):
            yield from _follow(member, inherited, asked=asked, index=index)
            continue
        own = {key: value for key, value in member.items() if key not in ("task", "group")}
        if "group" not in member:
            name = str(member.get("task", member.get("dataset_path")))
            yield from _follow(name, inherited | own, asked=asked, index=index)
        elif member["group"] in index:
            yield from _follow(member["group"], inherited | own, asked=asked, index=index)
        else:
            yield from _members(member, inherited, asked=asked, index=index)


def _need(settings: Mapping[str, Any], *, asked: str) -> Need:
    arguments = dict(settings.get("dataset_kwargs") or {})
    arguments.pop("trust_remote_code", None)  # lm-eval drops it too: datasets no longer runs code
    own_data = "custom_dataset" in settings or "class" in settings
    return Need(
        asked=asked,
        task=settings["task"],
        dataset=None if own_data else settings.get("dataset_path"),
        configuration=settings.get("dataset_name"),
        arguments=arguments,
        runs_answers=bool(settings.get("unsafe_code")),
    )
