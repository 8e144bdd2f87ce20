"""What a trip's stages left behind, read for the report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sat.compare.report import Challenge, Comparison
from megatron_sat.compare.runs import read_run
from megatron_sat.compare.stages import Stage
from megatron_sat.data.side_file import read_side_file
from megatron_sat.evaluate.result import Result
from megatron_sat.trip.course import CONTROL, DENSE, SAT, Course
from megatron_sat.trip.text import LANGUAGES
from megatron_sat.trip.travel import fitting_steps

SAME_BITS = {"fp32": 1e-3, "bf16": 3e-2}
"""Bits a character by which the exported model may differ from its checkpoint: sums in another order."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All of a finished trip."""

    vocabulary: Mapping[str, Any]
    """The report of tools/extend_vocab.py."""
    original: Result
    extended: Result
    sat: Result
    dense: Result
    control: Result
    exported: Result
    comparison: Comparison
    tokens: Mapping[str, tuple[int, int]]
    """By language: characters and tokens of its training text."""
    sizes: Mapping[str, int]
    """Bytes on disk, by what lies there."""
    stages: tuple[Stage, ...]
    """In the order of the trip."""

    @property
    def results(self) -> list[Result]:
        """In the order of the table; the exported model is SAT's again and has none."""
        return [self.original, self.extended, self.sat, self.dense, self.control]

    @property
    def export_difference(self) -> float:
        """The largest, in bits a character, between SAT's checkpoint and what was exported of it."""
        mine, theirs = self.sat.domains, self.exported.domains
        return max(
            abs(mine[name].measures.bits_per_character - theirs[name].measures.bits_per_character) for name in mine
        )

    @property
    def export_is_equal(self) -> bool:
        """Whether that is no more than rounding."""
        return self.export_difference <= SAME_BITS[self.sat.dtype]  # a NaN is not


def read_findings(course: Course, stages: Sequence[Stage]) -> Findings:
    """Of stages that are done. Raises ValueError where one of them left something else than it should."""
    control = course.control(steps=fitting_steps(course))
    dense, sat = (read_run(stage.folder, name=name) for stage, name in ((course.dense, DENSE), (course.sat, SAT)))
    return Findings(
        vocabulary=json.loads((course.vocabulary.folder / "model" / "vocabulary_extension.json").read_text()),
        original=_result(course.original),
        extended=_result(course.extended),
        sat=_result(course.trained(course.sat)),
        dense=_result(course.trained(course.dense)),
        control=_result(course.trained(control)),
        exported=_result(course.exported),
        comparison=Comparison(
            reference=dense,
            challenges=(Challenge(candidate=sat, control=read_run(control.folder, name=CONTROL)),),
            domains=LANGUAGES,
        ),
        tokens={language: _counted(course, language) for language in LANGUAGES},
        sizes={
            "the original, Hugging Face": _bytes(course.model),
            "with its new rows": _bytes(course.vocabulary.folder / "model"),
            "imported": _bytes(course.imported.folder / "model"),
            "SAT's checkpoint": _bytes(course.sat.folder),
            "exported": _bytes(course.export.folder / "model"),
        },
        stages=tuple(stages),
    )


def _result(stage: Stage) -> Result:
    return Result.load(stage.folder / "result" / "result.json")


def _counted(course: Course, language: str) -> tuple[int, int]:
    characters = tokens = 0
    for domain in course.text.files[language, "train"]:
        side = read_side_file(str(course.tokens.folder / "data" / f"{language}.{domain}"))
        if side is None:
            raise ValueError(f"{course.tokens.folder} must hold {language}.{domain}, it does not; run it again")
        characters += side.totals.characters
        tokens += side.totals.tokens
    return characters, tokens


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
