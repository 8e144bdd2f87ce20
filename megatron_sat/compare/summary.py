"""The report of a study: report.md, report.html with its pictures inside, report.json, progress.png.

Its first lines say what a reader must know before the rest: controls that were left out, times that do not compare,
commits that differ. Then who is ahead at equal time, whoever it is.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sat.compare.experiment import DENSE, EQUAL_TIME, RATE_ZERO, Experiment, method_alone, sparse
from megatron_sat.compare.operations import at_equal_operations
from megatron_sat.compare.page import Block, Bullets, Code, Heading, Picture, Table, as_html, as_markdown
from megatron_sat.compare.pictures import draw_progress
from megatron_sat.compare.provenance import Provenance
from megatron_sat.compare.report import LEVEL, cost_said, time_beside
from megatron_sat.compare.requirement import Verdict
from megatron_sat.compare.study import MEASURES, Spread, Study, language_figures, paired

PROGRESS = "progress.png"
_LOST = {
    DENSE: "what the variants gain or lose beside dense training",
    EQUAL_TIME: "whether dense training would have used a variant's time better, the question that decides",
    RATE_ZERO: "whether a variant that omits nothing is dense training",
}
NOTES = (
    "Losses are those of the dense model on held-out text, in nats a token; lower is better.",
    "Bits a character are the same loss times the tokens of a character of that text.",
    "Seconds are training alone, by each run's own record, without evaluations, checkpoints and start-up.",
    "Executed operations are those of the neurons that took part, forward and backward, and of choosing them.",
    "Numbers are means over seeds with the standard deviation of the sample; differences are taken seed by seed.",
    "A seed decides fresh weights, the order of the text and what sampling draws.",
    "Memory is what torch had allocated on a GPU at most, or the resident memory of a process without one.",
)


def write_summary(
    study: Study, folder: Path, *, told: Provenance, settings: Mapping[str, Any], verdicts: Sequence[Verdict] = ()
) -> None:
    """Write the report's files into ``folder``. settings: the experiment's, plain."""
    draw_progress(study, folder / PROGRESS)
    title = f"{study.experiment.name}: variants beside dense training"
    blocks = [
        Bullets(items=[*warnings(study), *how_timed(study), *in_short(study)]),
        *_required(verdicts),
        Heading(text="Quality"),
        Picture(path=folder / PROGRESS, says="Validation loss over training time and over operations"),
        _table(study, _quality_figures(study), digits=4),
        Heading(text="Cost"),
        _table(study, [*MEASURES, *(["seconds_to_dense"] if DENSE in study.groups else [])], digits=3),
        Heading(text="Every seed"),
        _seeds(study),
        Heading(text="What was run"),
        Code(text=told.command),
        Table(heads=["", ""], rows=_origin(study, told=told), texts=2),
        Code(text=json.dumps(settings, indent=1, ensure_ascii=False)),
        Heading(text="Mind this"),
        Bullets(items=[*NOTES, *_order(study)]),
    ]
    (folder / "report.md").write_text(as_markdown(title, blocks, folder=folder), encoding="utf-8")
    (folder / "report.html").write_text(as_html(title, blocks), encoding="utf-8")
    content = as_plain(study, told=told, verdicts=verdicts) | {"settings": settings}
    (folder / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def warnings(study: Study) -> list[str]:
    """What stands before everything else."""
    said = [
        f"LEFT OUT on request: the control {name}. Nothing here says {_LOST[name]}." for name in study.left_out
    ]
    if study.shared:
        said.append("RUNS SHARED THE MACHINE: seconds, tokens a second and what follows from them do not compare.")
    if len(study.commits) > 1:
        commits = "; ".join(study.commits)
        said.append(f"RUNS ARE OF DIFFERENT COMMITS ({commits}): remove the folders of the older ones and go on.")
    first = next(iter(study.evaluated), "")
    said += [
        f"OTHER TEXT JUDGES {name}: {_text(evaluated)} of each domain, where {first} has "
        f"{_text(study.evaluated[first])}. Their losses do not compare; give all the same eval_iters, "
        "global_batch_size and seq_length."
        for name, evaluated in study.evaluated.items()
        if evaluated != study.evaluated[first]
    ]
    said += [
        f"UNEQUAL TIME of {variant} and its control ({control}): {_seconds(study, variant, control)}. Remove "
        "`runs` and run again when the machine is quiet."
        for variant, control in study.equal_time.items()
        if study.off_time(variant)
    ]
    for seed, variant in ((seed, name) for name, found in study.differences.items() for seed in found):
        difference = study.differences[variant][seed]
        if difference is not None and method_alone(study.experiment.variants[variant]):
            said.append(
                f"NOT DENSE AT RATE 0: {variant} (seed {seed}): {difference}. It must be dense training, bit for bit; "
                "trust nothing here before that is mended."
            )
    return said


def _text(evaluated: tuple[int, int]) -> str:
    return f"{evaluated[0]:,} sequences of {evaluated[1]:,} tokens"


def how_timed(study: Study) -> list[str]:
    """How runs stood beside each other, where each had a GPU of its own, and which of their seconds count."""
    said = []
    if not study.shared and study.at_once != (1,):
        counts = ["alone" if number == 1 else f"{number} side by side" for number in study.at_once]
        uneven = "" if len(counts) == 1 else "; cores, disk and bus were not shared by equally many"
        said.append(f"Runs: one per GPU, {' or '.join(counts)}{uneven}.")
    if study.turns > 1:
        said.append(f"Runs took turns: one trained at a time, up to {study.turns - 1} others started up beside it.")
    if study.experiment.time == "settled":
        said.append("Times are settled: of each rate's first records, only what the others of that rate took counts.")
    return said


def in_short(study: Study) -> list[str]:
    """What came of every variant, a sentence each."""
    said = []
    for variant in study.experiment.variants:
        if variant in study.equal_time:
            said.append(_at_equal_time(study, variant))
        if DENSE in study.groups:
            said += [_after_equal_steps(study, variant), _cost(study, variant), _reached(study, variant)]
            said += at_equal_operations(study, variant)
        if variant in study.rate_zero:
            said.append(_at_rate_zero(study, variant))
        elif RATE_ZERO not in study.left_out and not sparse(study.experiment.variants[variant]):
            said.append(f"{variant} has no schedule of omission, so it has no control at rate 0.")
    return said


def _seconds(study: Study, *groups: str) -> str:
    return " against ".join(f"{study.figures[group]['seconds'].mean:.1f} s" for group in groups)


def _at_equal_time(study: Study, variant: str) -> str:
    control = study.equal_time[variant]
    mine, theirs = (study.figures[name]["seconds"].mean for name in (variant, control))
    steps = study.groups[variant].steps, study.groups[control].steps
    return (
        f"{time_beside(mine, control=theirs)}, {mine:.1f} s of {variant} for {steps[0]:,} steps and {theirs:.1f} s of "
        f"dense for {steps[1]:,}: {_standings(study, variant, control)}."
    )


def _after_equal_steps(study: Study, variant: str) -> str:
    return f"After {study.groups[variant].steps:,} steps: {_standings(study, variant, DENSE)}."


def _standings(study: Study, variant: str, other: str) -> str:
    return "; ".join(_standing(study, variant, other, figure=figure) for figure in language_figures(study))


def _standing(study: Study, variant: str, other: str, *, figure: str) -> str:
    """Who is ahead, by how much, and whether the seeds agree."""
    one, two = study.figures[variant][figure], study.figures[other][figure]
    difference = paired(one, two)
    values = f"{one.mean:.4f} against {two.mean:.4f}"
    if math.isnan(difference.mean):
        return f"on {figure} a run diverged ({values})"
    if abs(difference.mean) < LEVEL:
        return f"on {figure} {variant} and {other} are level ({values})"
    ahead, behind = (variant, other) if difference.mean < 0 else (other, variant)
    agreeing = sum((value < 0) == (difference.mean < 0) for value in difference.values.values())
    count = len(difference.values)
    seeds = "of one seed" if count == 1 else f"in {agreeing} of {count} seeds, ± {difference.std:.4f}"
    return f"on {figure} {ahead} is ahead of {behind} by {abs(difference.mean):.4f}, {seeds} ({values})"


def _cost(study: Study, variant: str) -> str:
    mine, theirs = study.figures[variant], study.figures[DENSE]

    def share(figure: str) -> float:
        return mine[figure].mean / mine["steps"].mean / (theirs[figure].mean / theirs["steps"].mean)

    return cost_said(variant, reference=DENSE, time=share("seconds"), flops=share("flops"))


def _reached(study: Study, variant: str) -> str:
    found, dense = study.figures[variant]["seconds_to_dense"], study.figures[DENSE]["seconds"]
    reached = [seconds for seconds in found.values.values() if math.isfinite(seconds)]
    if len(reached) < len(found.values):
        return f"{variant} reached dense's final loss in {len(reached)} of {len(found.values)} seeds."
    return f"{variant} reached dense's final loss after {found.mean:.1f} s; dense took {dense.mean:.1f} s in all."


def _at_rate_zero(study: Study, variant: str) -> str:
    found = study.differences[variant]
    must = method_alone(study.experiment.variants[variant])
    equal = [str(seed) for seed, difference in found.items() if difference is None]
    if len(equal) == len(found):
        return f"{variant} at rate 0 is dense training bit for bit (seed {', '.join(equal)})."
    first = next(difference for difference in found.values() if difference is not None)
    why = "and must be" if must else "and need not be, for it sets more than the method"
    return f"{variant} at rate 0 is not dense training, {why}: {first}."


def _required(verdicts: Sequence[Verdict]) -> list[Block]:
    if not verdicts:
        return []
    answers = ["yes" if v.holds else "NO" if v.doubt is None else f"NO: {v.doubt}" for v in verdicts]
    sides = [[f"`{v.text}`{v.of and f' ({v.of})'}", f"{v.left:.6g}", f"{v.right:.6g}"] for v in verdicts]
    rows = [[answer, *side] for answer, side in zip(answers, sides, strict=True)]
    return [Heading(text="Required"), Table(heads=["holds", "requirement", "left", "right"], rows=rows, texts=2)]


def _quality_figures(study: Study) -> list[str]:
    names = dict.fromkeys(name for figures in study.figures.values() for name in figures)
    return [name for name in names if name.endswith(("_loss", "_bpc"))]


def _table(study: Study, figures: Sequence[str], *, digits: int) -> Table:
    """A row for each figure, a column for each group: groups are few."""
    rows = [[figure, *(cell(study.figures[g].get(figure), digits=digits) for g in study.groups)] for figure in figures]
    return Table(heads=["", *(_head(study, group) for group in study.groups)], rows=rows)


def _head(study: Study, group: str) -> str:
    variants = [variant for variant, control in study.equal_time.items() if control == group]
    return f"{group} (the time of {', '.join(variants)})" if variants else group


def cell(spread: Spread | None, *, digits: int) -> str:
    """A figure over seeds, in a table."""
    if spread is None:
        return ""
    if not math.isfinite(spread.mean):
        return "diverged" if math.isnan(spread.mean) else "never"

    def said(value: float) -> str:
        if value == int(value) and abs(value) < 1e6:
            return f"{value:,.0f}"
        return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.4g}"

    exact = math.isnan(spread.std) or spread.std == 0
    return said(spread.mean) + ("" if exact else f" ± {said(spread.std)}")


def _seeds(study: Study) -> Table:
    figures = [name for name in _quality_figures(study) if name.endswith("_bpc")] or _quality_figures(study)
    figures = [*figures, "seconds", "steps"]
    rows = [
        [group, str(seed), *(cell(Spread(values={seed: found[f].values[seed]}), digits=4) for f in figures)]
        for group, found in study.figures.items()
        for seed in found["steps"].values
    ]
    return Table(heads=["group", "seed", *figures], rows=rows)


def _order(study: Study) -> list[str]:
    """What is known of the order of the text."""
    if all(passes <= 1 for passes in study.passes.values()):
        return ["No run read a text twice: all runs of a seed read the same in the same order, as far as they got."]
    most = ", ".join(f"{group} {passes:.2f}" for group, passes in study.passes.items())
    return [
        f"Some text was read more than once (passes of the most-read domain: {most}).",
        "Runs of a seed with equally many steps read it in the same order; others may shuffle its passes otherwise.",
    ]


def _origin(study: Study, *, told: Provenance) -> list[list[str]]:
    commits = "; ".join(study.commits)
    return [["commit", commits], ["machine", told.machine], ["libraries", told.libraries]]


def settings_of(experiment: Experiment, *, named: Callable[[Path], str]) -> dict[str, Any]:
    """All of an experiment as plain values. named: how a path is said."""

    def plain(value: Any) -> str:
        return named(value) if isinstance(value, Path) else str(value)

    return json.loads(json.dumps(asdict(experiment), default=plain))  # type: ignore[no-any-return]


def as_plain(study: Study, *, told: Provenance, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The report for programs. Numbers that are none stand as null, what was never reached too."""
    return {
        "name": study.experiment.name,
        "left_out": list(study.left_out),
        "warnings": warnings(study),
        "runs_at_once": list(study.at_once),
        "in_short": in_short(study),
        "required": [
            asdict(verdict) | {"left": _number(verdict.left), "right": _number(verdict.right)} for verdict in verdicts
        ],
        "figures": {group: {name: _plain(spread) for name, spread in f.items()} for group, f in study.figures.items()},
        "equal_time": dict(study.equal_time),
        "rate_zero": {name: {str(s): d for s, d in found.items()} for name, found in study.differences.items()},
        "curves": {group: _curves(study, group) for group in study.groups},
        "commits": list(study.commits),
        "told": asdict(told),
    }


def _plain(spread: Spread) -> dict[str, Any]:
    seeds = {str(seed): _number(value) for seed, value in spread.values.items()}
    return {"mean": _number(spread.mean), "std": _number(spread.std), "seeds": seeds}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _curves(study: Study, group: str) -> Mapping[str, Any]:
    """By seed, every evaluation."""
    return {
        str(seed): [
            {
                "step": point.step,
                "seconds": point.elapsed_seconds,
                **{name: _number(value) for name, value in study.quality(point.loss).items()},
            }
            for point in trial.run.validations
        ]
        for seed, trial in study.groups[group].trials.items()
    }
