"""Studies that nobody made: dense, a variant and its controls, of runs that never trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sat.compare.experiment import Experiment, experiment_from
from megatron_sat.compare.study import Group, Study, Trial
from tests.compare.synthetic import run

GIVEN: dict[str, Any] = {
    "model": {"fresh": {"num_layers": 2}, "tokenizer": "tokenizer.model"},
    "data": {
        "train": {"zh": "zh.jsonl"},
        "valid": {"zh": "zh.dev.jsonl", "en": "en.dev.jsonl"},
        "new": "zh",
        "old": "en",
    },
    "budget": {"steps": 100},
    "training": {"lr": 1e-3, "seq_length": 8},
    "seeds": [1, 2],
    "variants": {"sat": {"sat_schedule": "constant", "sat_omission_rate": 0.5}},
}
"""What a file holds."""


def experiment(folder: Path, **changes: Any) -> Experiment:
    """Of `GIVEN`, with other parts."""
    return experiment_from({**GIVEN, **changes}, folder=folder, name="made")


def group(folder: Path, name: str, *shapes: Mapping[str, Any], gib: float = 1.0, commit: str = "abc") -> Group:
    """A group of one run for each shape; seeds count from 1."""
    trials = {
        seed: Trial(
            run=run(folder / f"{name}-{seed}", name, **shape), peak_memory_bytes=int(gib * 2**30), commits=(commit,)
        )
        for seed, shape in enumerate(shapes, 1)
    }
    return Group(name=name, trials=trials)


def study(folder: Path, **changes: Any) -> Study:
    """SAT did 100 steps in 80 % of dense's time: behind its control on zh in both seeds, ahead on en."""
    dense = group(folder, "dense", {"zh": 5.0, "en": 4.0}, {"zh": 5.1, "en": 4.0})
    fast = {"pace": 0.4, "flops": 6e8, "rate": 0.5}
    sat = group(folder, "sat", {"zh": 5.2, "en": 3.9, **fast}, {"zh": 5.4, "en": 3.9, **fast})
    zero = group(folder, "sat_rate_0", {"zh": 5.0, "en": 4.0})
    control = group(folder, "dense_80_steps", {"zh": 5.1, "en": 4.1, "steps": 80}, {"zh": 5.2, "en": 4.1, "steps": 80})
    fields: dict[str, Any] = {
        "experiment": experiment(folder),
        "groups": {each.name: each for each in (dense, sat, zero, control)},
        "starts": {1: {"zh": 9.0, "en": 3.5}, 2: {"zh": 9.0, "en": 3.5}},
        "tokens_per_character": {"zh": 0.5},
        "equal_time": {"sat": "dense_80_steps"},
        "rate_zero": {"sat": "sat_rate_0"},
        "differences": {"sat": {1: None}},
        "passes": {"dense": 0.5, "sat": 0.5, "sat_rate_0": 0.5, "dense_80_steps": 0.4},
    }
    return Study(**fields | changes)
