"""Runs that never trained: straight lines of loss and time, written as a training run writes them."""

import json
from pathlib import Path
from typing import Any

from megatron_sat.compare.report import Challenge, Comparison
from megatron_sat.compare.runs import METRICS, Run, read_run

WINDOW = 10
"""Steps between two records."""


def entries(
    *,
    steps: int = 100,
    pace: float = 0.5,
    zh: float = 5,
    en: float = 4,
    flops: float = 1e9,
    rate: float = 0,
    english: str = "en",
) -> list[dict[str, Any]]:
    """A run of ``steps`` steps of ``pace`` seconds; losses go down from 9 to ``zh`` and ``en`` in a line.

    english: what the second domain is called.
    """
    lines: list[dict[str, Any]] = []
    for step in range(WINDOW, steps + 1, WINDOW):
        share = step / steps
        seconds = step * pace
        omitted = rate if share <= 0.5 else 0.0
        lines.append(
            {
                "kind": "train",
                "step": step,
                "elapsed_seconds": seconds,
                "loss": 9 - share,
                "executed_flops": flops * step,
                "consumed_tokens": 2048 * step,
                "nominal_omission_rate": omitted,
                "omission_rate": {"attention": omitted, "mlp": omitted / 2} if rate else {},
            }
        )
        loss = {"zh": 9 - share * (9 - zh), english: 9 - share * (9 - en)}
        lines.append({"kind": "validation", "step": step, "elapsed_seconds": seconds, "loss": loss})
    return lines


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    """The folder, now with these records."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(tmp_path: Path, name: str, **shape: Any) -> Run:
    """A run that was written and read back."""
    return read_run(write(tmp_path / name, entries(**shape)), name=name)


def comparison(tmp_path: Path, **changes: Any) -> Comparison:
    """Dense and SAT did 100 steps, SAT in 80 % of the time; dense is ahead on zh, SAT on en."""
    challenge = Challenge(
        candidate=run(tmp_path, "SAT", pace=0.4, zh=5.2, en=3.9, flops=6e8, rate=0.5),
        control=run(tmp_path, "equal-time", steps=80, pace=0.5, zh=5.1, en=4.1),
    )
    fields: dict[str, Any] = {
        "start": run(tmp_path, "start", zh=8.0, en=4.5),
        "reference": run(tmp_path, "dense"),
        "challenges": (challenge,),
        "domains": ("zh", "en"),
        "tokens_per_character": {"zh": 0.5},
    }
    return Comparison(**fields | changes)
