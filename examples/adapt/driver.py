"""What the trips of examples/ share: a file of settings, the machine, and one call for everything.

A file has two parts: ``trip`` (`megatron_sat.trip.settings`) and ``training`` (settings of pretrain_sat.py by key).
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_sat.compare import provenance
from megatron_sat.compare.report import columns, rows
from megatron_sat.compare.stages import MARKER, Runner
from megatron_sat.compare.workshop import Workshop, environment_of, this_machine
from megatron_sat.log import say, table
from megatron_sat.trip.course import Course
from megatron_sat.trip.findings import Findings, read_findings
from megatron_sat.trip.report import in_short, write_report
from megatron_sat.trip.settings import Settings, settings_from
from megatron_sat.trip.travel import rehearse, travel

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "examples" / "data"
PARTS = ("trip", "training")
PROGRESS = re.compile(r"step +\d+ \||.*: [\d,]+ documents, |loss on |TP=|imported|exported|wrote|unpacked")


def read_recipe(*files: Path, more: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The parts of files of settings; a later file overrides an earlier one, key by key. more: further parts."""
    names = [*PARTS, *more]
    parts: dict[str, dict[str, Any]] = {part: {} for part in names}
    for file in files:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"--config must be a readable YAML file, {file} is not: {said}; mend it") from error
        if not isinstance(content, dict) or not set(content) <= set(names) or not _all_maps(content):
            raise ValueError(
                f"--config must have the parts {' and '.join(names)} with keys and values, {file} has not; "
                "see examples/adapt"
            )
        for part, given in content.items():
            parts[part] |= given
    return parts


def _all_maps(content: Mapping[str, Any]) -> bool:
    return all(isinstance(part, dict) for part in content.values())


def settings_of(recipe: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The trip's settings, those that follow from the training's among them."""
    training = recipe["training"]
    if "seq_length" not in training:
        raise ValueError("training: seq_length must be given, it is not; write for instance seq_length: 1024")
    follow = {
        "seq_length": training["seq_length"],
        "tensor_parallel": training.get("tensor_model_parallel_size", 1),
        "resumable": bool(training.get("save_interval")) and training.get("save_optim", True),
    }
    return settings_from({"ranks": follow["tensor_parallel"], **recipe["trip"], **follow})


def write_training(training: Mapping[str, Any], out: Path, *, name: str = "training.yaml") -> Path:
    """pretrain_sat.py's part as a file in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / name
    path.write_text(yaml.safe_dump(dict(training), sort_keys=False), encoding="utf-8")
    return path


def workshop(*, jobs: int | None) -> Workshop:
    """This machine. jobs: stages at once; None: as many as cores, at most four."""
    return this_machine(ROOT, jobs=jobs)


def go(course: Course, *, dry: bool, fresh: bool, command: Sequence[str], notes: Sequence[str] = ()) -> None:
    """Make the trip and write its report, or only say its commands.

    Raises RuntimeError where the exported model is not SAT's, after the report is written.
    """
    if dry:
        rehearse(course)
        return
    if fresh:
        for marker in course.out.glob(f"**/{MARKER}"):
            marker.unlink()
    environment = environment_of(os.environ)
    runner = Runner(environment=environment, shown=is_progress, working_folder=ROOT, jobs=course.shop.jobs)
    stages = travel(course, runner)
    found = read_findings(course, stages)
    told = provenance.provenance(ROOT, command=" ".join(command))
    write_report(found, course.out, told=told, notes=notes)
    _conclude(found, course)


def _conclude(found: Findings, course: Course) -> None:
    heads, *lines = zip(
        columns(found.comparison), *rows(found.comparison), strict=True
    )  # a column a run: 80 characters
    table("Dense, SAT, and dense for SAT's time", heads, lines)
    for sentence in in_short(found):
        say(f"- {sentence}")
    say(f"{course.shop.named(course.out / 'report.html')} holds this and more, report.md beside it the same")
    if not found.export_is_equal:
        raise RuntimeError(
            f"the exported model must be SAT's, {course.export.folder} is not; the report says how far off"
        )


def is_progress(line: str) -> bool:
    """Whether the console shows this line of a stage; all are in its folder's log.txt."""
    return bool(PROGRESS.match(line))
