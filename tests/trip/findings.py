"""Findings of a trip that nobody made, for its report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sat.compare.report import Comparison
from megatron_sat.compare.runs import Run
from megatron_sat.compare.stages import Stage
from megatron_sat.evaluate.result import Domain, Result
from megatron_sat.trip.course import CONTROL, DENSE, EXPORTED, EXTENDED, ORIGINAL, SAT
from megatron_sat.trip.findings import Findings
from tests.compare import synthetic

LN2 = 0.6931471805599453
VOCABULARY: dict[str, Any] = {
    "old_tokens": 49152,
    "new_tokens": 8000,
    "proofs": [{"statement": "every new piece can be produced", "tried_on": "8,000 pieces", "offenders": []}],
    "tokens_per_character": [
        {"domain": "zh/poetry", "characters": 1000, "before": 2.0, "after": 1.0},
        {"domain": "zh/law", "characters": 1000, "before": 1.0, "after": 0.5},
        {"domain": "en/law", "characters": 1000, "before": 0.25, "after": 0.25},
    ],
    "loss_per_character": {"characters": 500, "before": 4.0, "after": 4.5},
}


def result(name: str, *, zh: float, en: float, dtype: str = "fp32") -> Result:
    """One that needs so many bits a character of two Chinese domains' mean, and of an English one."""
    bits = {"zh/poetry": zh + 1, "zh/law": zh - 1, "en/law": en}
    domains = {
        domain: Domain(documents=1, tokens=50, characters=100, bytes=300, nats=100 * value * LN2)
        for domain, value in bits.items()
    }
    return Result(
        name=name,
        model=f"models/{name}",
        kind="hf",
        step=None,
        seq_length=64,
        stride=32,
        dtype=dtype,
        tokenizer="abc",
        domains=domains,
    )


def stage(folder: Path, name: str, *, seconds: float) -> Stage:
    """One that is done."""
    made = Stage(name=name, folder=folder / name, command=("true",))
    made.folder.mkdir(parents=True, exist_ok=True)
    (made.folder / "done.json").write_text(f'{{"key": "{made.key}", "seconds": {seconds}}}')
    return made


def renamed(run: Run, name: str) -> Run:
    return replace(run, name=name)


def comparison(folder: Path) -> Comparison:
    """Dense and SAT did 100 steps, SAT in 80 % of the time."""
    made = synthetic.comparison(folder)
    (challenge,) = made.challenges
    pair = replace(challenge, candidate=renamed(challenge.candidate, SAT), control=renamed(challenge.control, CONTROL))
    return replace(made, start=None, reference=renamed(made.reference, DENSE), challenges=(pair,))


def findings(folder: Path, **changes: Any) -> Findings:
    """SAT is behind its control on zh, ahead on en."""
    fields: dict[str, Any] = {
        "vocabulary": VOCABULARY,
        "original": result(ORIGINAL, zh=9, en=2),
        "extended": result(EXTENDED, zh=10, en=2),
        "sat": result(SAT, zh=5.5, en=2.25),
        "dense": result(DENSE, zh=5, en=2.5),
        "control": result(CONTROL, zh=5.25, en=2.375),
        "exported": result(EXPORTED, zh=5.5, en=2.25),
        "comparison": comparison(folder),
        "tokens": {"zh": (1_000_000, 500_000), "en": (2_000_000, 490_000)},
        "sizes": {"exported": 270_000_000},
        "stages": (stage(folder, "vocabulary", seconds=12.25),),
    }
    return Findings(**fields | changes)
