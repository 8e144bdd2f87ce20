"""The report of a trip: report.md, and report.html with its pictures inside.

Every number is read from what the stages left. The dense run that had SAT's time stands in every table.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_sat.compare.curves import draw_curves
from megatron_sat.compare.page import Block, Bullets, Code, Heading, Picture, Table, as_html, as_markdown
from megatron_sat.compare.provenance import Provenance
from megatron_sat.compare.report import LEVEL, NOTES, columns, rows, time_said, verdicts
from megatron_sat.compare.runs import Run
from megatron_sat.evaluate.chart import draw_chart
from megatron_sat.evaluate.result import Result, lines_of
from megatron_sat.trip.course import CONTROL, DENSE, ORIGINAL, SAT
from megatron_sat.trip.findings import SAME_BITS, Findings
from megatron_sat.trip.text import LANGUAGES, NEW, OLD

CURVES, DOMAINS = "curves.png", "domains.png"
TITLE = "A model on its way into Chinese"
_LEVEL_BITS = LEVEL
"""Bits a character that print alike."""


def write_report(found: Findings, folder: Path, *, told: Provenance, notes: Sequence[str] = ()) -> None:
    """Write report.md, report.html and the pictures into ``folder``."""
    draw_curves(found.comparison, folder / CURVES)
    draw_chart(found.results, folder / DOMAINS)
    blocks = [
        Bullets(items=in_short(found)),
        *_what_was_run(found, told=told),
        *_vocabulary(found),
        *_quality(found, folder=folder),
        *_training(found, folder=folder),
        *_sizes(found),
        Heading(text="Mind this"),
        Bullets(items=[*NOTES, *_notes(found), *notes]),
    ]
    (folder / "report.md").write_text(as_markdown(TITLE, blocks, folder=folder), encoding="utf-8")
    (folder / "report.html").write_text(as_html(TITLE, blocks), encoding="utf-8")


def in_short(found: Findings) -> list[str]:
    """What came of it, a sentence each."""
    said = [_pieces(found)]
    for language in LANGUAGES:
        bits = ", ".join(f"{each.name} {_bits(each, language):.3f}" for each in found.results)
        said.append(f"Bits a character of {language}, mean of its domains: {bits}.")
    said += [
        _forgetting(found),
        f"{time_said(found.comparison.challenges[0])}: {_beside(found.sat, found.control)}.",
        f"After equally many steps: {_beside(found.sat, found.dense)}.",
        *verdicts(found.comparison)[:1],
        _export(found),
    ]
    return said


def _pieces(found: Findings) -> str:
    report = found.vocabulary
    proofs = report["proofs"]
    holding = sum(not proof["offenders"] for proof in proofs)
    means = [_tokens_per_character(found, language=NEW, when=when) for when in ("before", "after")]
    return (
        f"{report['new_tokens']:,} pieces were added to {report['old_tokens']:,}; {holding} of {len(proofs)} proofs "
        f"hold; a character of held-out {NEW} needs {means[1]:.3f} tokens, it needed {means[0]:.3f}."
    )


def _tokens_per_character(found: Findings, *, language: str, when: str) -> float:
    """Mean of the language's domains."""
    entries = [e for e in found.vocabulary["tokens_per_character"] if e["domain"].startswith(f"{language}/")]
    return sum(entry[when] for entry in entries) / len(entries)


def _forgetting(found: Findings) -> str:
    before = _bits(found.original, OLD)
    changes = [f"{each.name} {_bits(each, OLD) - before:+.3f}" for each in (found.sat, found.dense, found.control)]
    return f"What {OLD} cost, bits a character against {ORIGINAL} ({before:.3f}): {', '.join(changes)}."


def _beside(candidate: Result, other: Result) -> str:
    """Who is ahead, in bits a character of either language."""
    said = []
    for language in LANGUAGES:
        ahead, behind = sorted((candidate, other), key=lambda each: _bits(each, language))
        lower, higher = _bits(ahead, language), _bits(behind, language)
        if higher - lower < _LEVEL_BITS:
            said.append(f"on {language} {candidate.name} and {other.name} are level ({lower:.3f})")
        else:
            said.append(
                f"on {language} {ahead.name} is ahead of {behind.name} by {higher - lower:.3f} bits a character "
                f"({lower:.3f} against {higher:.3f})"
            )
    return "; ".join(said)


def _bits(result: Result, language: str) -> float:
    return result.languages[language].bits_per_character


def _export(found: Findings) -> str:
    difference, allowed = found.export_difference, SAME_BITS[found.sat.dtype]
    verdict = "equal but for rounding" if found.export_is_equal else "NOT EQUAL: do not use the exported folder"
    return (
        f"The exported folder, read by transformers, and SAT's checkpoint differ by {difference:.1e} bits a character "
        f"at most (allowed: {allowed:g}): {verdict}."
    )


# -- sections


def _what_was_run(found: Findings, *, told: Provenance) -> list[Block]:
    text = [f"{name}: {count:,} characters, {tokens:,} tokens" for name, (count, tokens) in found.tokens.items()]
    lines = [
        ["commit", told.commit],
        ["machine", told.machine],
        ["libraries", told.libraries],
        ["model", found.original.model],
        ["training text", "; ".join(text)],
    ]
    return [Heading(text="What was run"), Code(text=told.command), Table(heads=["", ""], rows=lines, texts=2)]


def _vocabulary(found: Findings) -> list[Block]:
    report = found.vocabulary
    proofs = [["NO" if p["offenders"] else "yes", p["statement"], p["tried_on"]] for p in report["proofs"]]
    fertility = [
        [entry["domain"], f"{entry['characters']:,}", f"{entry['before']:.3f}", f"{entry['after']:.3f}"]
        for entry in report["tokens_per_character"]
    ]
    loss = report["loss_per_character"]
    sentence = (
        f"Before any training the model with its new rows loses {loss['after']:.3f} nats a character on "
        f"{loss['characters']:,} characters of held-out Chinese; it lost {loss['before']:.3f} with the old tokenizer."
    )
    return [
        Heading(text="The vocabulary"),
        Table(heads=["holds", "statement", "tried on"], rows=proofs, texts=3),
        Table(heads=["tokens a character", "characters", "before", "after"], rows=fertility),
        Bullets(items=[sentence]),
    ]


def _quality(found: Findings, *, folder: Path) -> list[Block]:
    heads = ["bits a character", *(result.name for result in found.results), f"{SAT} - {ORIGINAL}"]
    lines = []
    for name, before in lines_of(found.original).items():
        bits = [lines_of(result)[name].bits_per_character for result in found.results]
        change = lines_of(found.sat)[name].bits_per_character - before.bits_per_character
        lines.append([name, *(f"{value:.3f}" for value in bits), f"{change:+.3f}"])
    return [
        Heading(text="Before and after, by domain"),
        Table(heads=heads, rows=lines),
        Picture(path=folder / DOMAINS, says="Bits a character by domain, before and after"),
    ]


def _training(found: Findings, *, folder: Path) -> list[Block]:
    comparison = found.comparison
    reference = comparison.reference
    speed = [_speed(run, reference=reference) for run in comparison.runs]
    heads = ["run", "steps", "ms a step", "median", "tokens/s", "FLOPs a step", "time a step", "time (of dense)"]
    return [
        Heading(text="Training"),
        Picture(path=folder / CURVES, says="Validation loss and omission rate over training time"),
        Table(heads=columns(comparison), rows=rows(comparison)),
        Bullets(items=verdicts(comparison)),
        Table(heads=heads, rows=speed),
    ]


def _speed(run: Run, *, reference: Run) -> list[str]:
    flops = run.executed_flops / run.steps / (reference.executed_flops / reference.steps)
    return [
        run.name,
        f"{run.steps:,}",
        f"{1000 * run.step_seconds:.1f}",
        f"{1000 * run.median_step_seconds:.1f}",
        f"{run.tokens_per_second:,.0f}",
        f"{flops:.3f}",
        f"{run.step_seconds / reference.step_seconds:.3f}",
        f"{run.seconds / reference.seconds:.3f}",
    ]


def _sizes(found: Findings) -> list[Block]:
    sizes = [[name, f"{size / 1e6:,.1f}"] for name, size in found.sizes.items()]
    times = [[stage.name, f"{stage.seconds:.1f}"] for stage in found.stages]
    return [
        Heading(text="Sizes and times"),
        Table(heads=["what", "10^6 bytes"], rows=sizes),
        Table(heads=["stage", "seconds, its start counted in"], rows=times),
    ]


def _notes(found: Findings) -> list[str]:
    result = found.original
    windows = f"windows of {result.seq_length} tokens with stride {result.stride}, {result.dtype}"
    steps = f"{DENSE.capitalize()} and {SAT} did equally many steps; {CONTROL} did as many dense ones as fit into"
    return [
        f"Bits a character do not depend on the tokenizer; they are of the dense model on held-out text, in {windows}.",
        f"A window holds more text once the vocabulary is larger: part of what {NEW} gains is longer context.",
        f"{steps} {SAT}'s training time, its learning rate decayed over just these.",
    ]
