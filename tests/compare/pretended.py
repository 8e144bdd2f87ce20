"""A comparison whose programs only pretend: the lab it is made in, and what was called (`fake_runs`)."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sat.compare.conduct import Conduct
from megatron_sat.compare.experiment import Experiment
from megatron_sat.compare.lab import Lab
from megatron_sat.compare.stages import Runner
from megatron_sat.compare.study import Study
from megatron_sat.compare.workshop import Workshop
from tests.compare.studies import experiment

FAKE = Path(__file__).parent / "fake_runs.py"
MODEL = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
}
TRAINING = {"lr": 1e-3, "seq_length": 8, "micro_batch_size": 1, "global_batch_size": 1, "num_workers": 0}
SAT = {"sat_schedule": "constant", "sat_omission_rate": 0.5}
FIRST = ["text", "start/1 1", "start/2 1"]


def lab_in(folder: Path) -> Lab:
    """With one variant, two seeds, and an interpreter that pretends."""
    interpreter = folder / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} -S {FAKE} "$@"\n')
    interpreter.chmod(0o755)
    for name in ("zh.jsonl", "zh.dev.jsonl", "en.dev.jsonl", "tokenizer.model"):
        (folder / name).write_text("")
    return Lab(
        shop=Workshop(root=folder, python=str(interpreter), made_with="here", cores=2, jobs=1),
        experiment=asked(folder),
        out=folder / "out",
    )


def asked(folder: Path, **changes: Any) -> Experiment:
    """One variant, two seeds, with other parts."""
    model = {"fresh": MODEL, "tokenizer": "tokenizer.model"}
    budget = {"steps": 40}
    return experiment(
        folder, **{"model": model, "training": TRAINING, "budget": budget, "variants": {"sat": SAT}, **changes}
    )


def other_lab(lab: Lab, **changes: Any) -> Lab:
    """The same folder, another file."""
    return replace(lab, experiment=asked(lab.shop.root, **changes))


class _Unread(Conduct):
    """Does not read the runs' command lines, which takes longer than all that is pretended here."""

    def check(self) -> dict[str, tuple[int, int]]:
        return {}


def conduct_of(
    lab: Lab,
    *,
    jobs: int = 1,
    without: tuple[str, ...] = (),
    gpus: tuple[str, ...] = (),
    turns: int = 1,
    reads: bool = False,
    **environment: str,
) -> Conduct:
    """What makes the lab's comparison; calls are counted anew. reads: the command lines, which takes a while."""
    calls = lab.shop.root / "calls"
    calls.write_text("")
    runner = Runner(
        environment=os.environ | {"CALLS": str(calls), **environment},
        shown=lambda line: False,
        working_folder=lab.shop.root,
        jobs=jobs,
    )
    return (Conduct if reads else _Unread)(lab=lab, runner=runner, without=without, gpus=gpus, turns=turns)


def made(lab: Lab, **how: Any) -> tuple[Study, list[str]]:
    """What came of it, and the calls: GROUP/SEED STEPS of a run."""
    study = conduct_of(lab, **how).study()
    return study, calls_of(lab)


def calls_of(lab: Lab) -> list[str]:
    """In the order in which they ended."""
    return (lab.shop.root / "calls").read_text().splitlines()


RUNS = ["dense/1 40", "sat/1 40", "sat_rate_0/1 40", "dense/2 40", "sat/2 40"]
CONTROLS = ["dense_20_steps/1 20", "dense_20_steps/2 20"]
SAME = ["same dense-sat_rate_0-seed-1"]
