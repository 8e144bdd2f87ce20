#!/usr/bin/env python3
"""Ways of fine-tuning beside each other: quality, time and memory of full, SAT, SPDF, LoRA, (IA)³ and SpIEL.

    sft_methods.py --model DIR --data FILE.. --steps N --out FILE.json [--methods NAME..] [--seeds 1 2]
                   [--lr NAME=VALUE..] [--flags="--bf16 --global-batch-size 64 ..."]

Tables 3 and 4 of the paper, for one GPU or a CPU. Each method is examples/sft_hf.py's, one run after the other in one
process, from the same weights, over the same examples in the same order. A part of the records is held out and judges:
nats a token of a response, and how often the right response is likelier than three others (`sft_choice`). Beside each
SAT runs the control that decides: full fine-tuning with as many steps as fit into SAT's time, its learning rate decayed
over those. Seconds are of training alone, after the first steps of such a run, which are thrown away. A method that
fails is reported and the others go on; FILE.json, and the table in FILE.md, are written after every run.
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from benchmarks.sft_choice import COUNT, candidates, choice_accuracy
from benchmarks.timing import Laps
from examples.sft_hf import Material, build_trainer, read_flags, read_material, response_loss, trained_parameters
from examples.sft_hf_methods import Prepared
from megatron_sat import log
from megatron_sat.compare.provenance import provenance
from megatron_sat.hf import SatCallback

METHODS = {
    "full": "full",
    "lora": "lora",
    "ia3": "ia3",
    "spiel": "spiel",
    "spdf": "spdf",
    "sat": "sat",
    "sat-contribution": "sat --sat-importance contribution --sat-selection top-k --sat-omission-rate 1/3",
}
"""By name, the method of sft_hf.py and its flags; sat: the paper's, r = .96 for half of the steps, then dense."""
METHODS_HELP = f"of {', '.join(METHODS)}, or NAME='METHOD FLAGS'"
START = {"untrained": "full"}
"""What all begin with."""
PACE = "full"
"""Whose steps fill SAT's time."""
Row = dict[str, Any]


def main(argv: Sequence[str]) -> list[Row]:
    """Make every run; returns a row for each. Raises ValueError for what cannot be done by any method."""
    args = arguments(argv)
    command = shlex.join(["python", "benchmarks/sft_methods.py", *argv])
    about = vars(provenance(ROOT, command=command, also=("accelerate", "peft")))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, swift_collections():
        lines = {name: command_line(args, flags, folder=folder) for name, flags in (START | args.methods).items()}
        known = [read_flags(line) for line in lines.values()]  # what is misspelt ends it here
        material = hold_out(read_material(known[0]), count=args.held_out)
        for row in Bench(args, lines=lines, material=material).rows():
            rows.append(row)
            write(args.out, rows, args=args, material=material, about=about)
    shown = [[line[HEADS.index(head)] for head in SHOWN] for line in table(rows)]
    log.table(f"{args.model.name}; more in {args.out.with_suffix('.md')}", SHOWN, shown)
    return rows


@contextmanager
def swift_collections() -> Iterator[None]:
    """Collecting a run's garbage does not walk what was imported before any run; that takes a second each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# -- flags


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; --methods becomes {name: flags}. Leaves the program, with a line, for what is no method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a Llama, Mistral, Qwen2 or Qwen3 model")
    add("--data", nargs="+", required=True, help="instruction records, as sft_hf.py reads them")
    add("--out", type=Path, required=True, help="JSON file; the table lies beside it, .md")
    add("--steps", type=int, required=True, help="updates of every run, but for the controls")
    add("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=METHODS_HELP)
    add("--seeds", type=int, nargs="+", default=[1], help="of the order of examples, of LoRA's start, of choices")
    add("--lr", nargs="+", default=[], metavar="NAME=VALUE", help="instead of that of the method's source")
    add("--held-out", type=int, default=400, help="records that judge; the same ones for every seed")
    add("--warm-up", type=int, default=8, help="steps that begin a method's first run and are thrown away before it")
    add("--flags", default="", help="more flags of sft_hf.py, for all methods")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.warm_up < 0:
        parser.error(f"--steps must be at least 1 and --warm-up at least 0, got {args.steps} and {args.warm_up}")
    named = dict(_named(text) for text in args.methods)
    unknown = [name for name, flags in named.items() if not flags]
    if unknown:
        parser.error(f"--methods must be {METHODS_HELP}, got {', '.join(unknown)}")
    if PACE not in named and any(is_sat(flags) for flags in named.values()):
        parser.error(f"--methods must have {PACE} where SAT is, whose time a control of its steps fills; add it")
    args.methods = named
    for text in args.lr:
        name, _, value = text.partition("=")
        if name not in named or not value:
            parser.error(f"--lr must be NAME=VALUE with a NAME of --methods, got {text}; try {PACE}=1e-4")
        named[name] += f" --lr {value}"
    return args


def _named(text: str) -> tuple[str, str]:
    """The name and the flags of what --methods was given; no flags where there is no such method."""
    name, _, flags = text.partition("=")
    return name, flags or METHODS.get(name, "")


def is_sat(flags: str) -> bool:
    """Whether a method of --methods is SAT."""
    return flags.split()[0] == "sat"


def command_line(args: argparse.Namespace, flags: str, *, folder: str) -> list[str]:
    """What sft_hf.py would be told, but for seed and steps. The held-out records are of --data, no files are read."""
    files = ["--data", *args.data, "--valid-data", *args.data]
    where = ["--model", str(args.model), *files, "--save", folder, "--log-interval", str(max(1, args.steps // 10))]
    return [*where, *shlex.split(args.flags), "--method", *shlex.split(flags)]


# -- runs


class Bench:
    """All runs of a command, one after the other."""

    def __init__(self, args: argparse.Namespace, *, lines: dict[str, list[str]], material: Material) -> None:
        self._args, self._lines, self._material = args, lines, material
        self._asked = candidates(material.held_out)
        self._warm: set[str] = set()

    def rows(self) -> Iterator[Row]:
        """A row for each run, as it ends."""
        for name in START:
            yield self._tried(name, of=name, seed=self._args.seeds[0], steps=0)
        for seed in self._args.seeds:
            found: dict[str, Row] = {}
            for name in self._args.methods:
                found[name] = self._tried(name, of=name, seed=seed, steps=self._args.steps)
                yield found[name]
            for name, flags in self._args.methods.items():
                if is_sat(flags) and not {"failed"} & (found[name].keys() | found[PACE].keys()):
                    steps = max(1, int(found[name]["seconds"] * found[PACE]["steps per second"]))
                    yield self._tried(f"{PACE}, time of {name}", of=PACE, seed=seed, steps=steps)

    def _tried(self, name: str, *, of: str, seed: int, steps: int) -> Row:
        """A run of method ``of``, or what it failed of: the others are not to be lost."""
        row: Row = {"name": name, "seed": seed, "steps": steps}
        log.say(f"{name}, seed {seed}: {steps} steps")
        try:
            if steps and self._args.warm_up and of not in self._warm:
                self._trained(of, seed=seed, steps=steps, until=self._args.warm_up)
                self._warm.add(of)
            trainer, trained = self._trained(of, seed=seed, steps=steps)
            return row | trained | self._judged(trainer, batch=trainer.args.per_device_train_batch_size)
        except Exception as error:  # noqa: BLE001  # also a full GPU, and what libraries raise
            log.say(f"{name}, seed {seed}, failed: {type(error).__name__}: {error}")
            return row | {"failed": f"{type(error).__name__}: {error}"}

    def _trained(self, name: str, *, seed: int, steps: int, until: int | None = None) -> tuple[Trainer, Row]:
        """One training from the model's files, and what it took. steps: 0 trains nothing. until: a last step before."""
        gc.collect()  # a Trainer and its model hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        args = read_flags([*self._lines[name], "--seed", str(seed), "--train-iters", str(max(steps, 1))])
        trainer, prepared = build_trainer(args, self._material, steps=max(steps, 1))
        trainer.remove_callback(PrinterCallback)
        if not steps:
            return trainer, {}
        clock = Clock()
        trainer.add_callback(clock)  # the last: what others do at the beginning is in no time
        if until is not None:
            trainer.add_callback(End(until))
        trainer.train()
        return trainer, {
            "learning rate": args.lr,
            "seconds": sum(clock.steps),
            "steps per second": len(clock.steps) / sum(clock.steps),
            "step seconds": [round(seconds, 5) for seconds in clock.steps],
            "peak GiB": clock.peak,
            "trained parameters": trained_parameters(prepared.model),
            "omitted": omitted(prepared),
        }

    def _judged(self, trainer: Trainer, *, batch: int) -> Row:
        """What the held-out records say of a model."""
        loss = response_loss(trainer, self._material.held_out, batch=batch)
        return {"loss": loss, "accuracy": choice_accuracy(trainer, self._asked, batch=batch)}


def omitted(prepared: Prepared) -> dict[str, float]:
    """The share of heads and of channels that SAT's first step leaves out, after quotas; nothing for the others."""
    sparse = [callback.sparse for callback in prepared.callbacks if isinstance(callback, SatCallback)]
    return sparse[0].omission_rates(1) if sparse else {}


class End(TrainerCallback):
    """Ends a run after a step, if it is not over by then; all that depends on its length stays as it is."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


class Clock(TrainerCallback):
    """What each step takes on the device, from the end of the one before, and the memory of all."""

    steps: list[float]
    """Seconds."""
    peak: float | None
    """GiB that were allocated at once on the GPU; None without one."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._laps = Laps()
        self._laps.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._laps.mark()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = self._laps.seconds()
        self.peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def hold_out(material: Material, *, count: int) -> Material:
    """Leave ``count`` records out of those that are learnt, drawn once and for all. Raises ValueError for too many."""
    most = len(material.train) - 1
    if not COUNT <= count <= most:
        raise ValueError(
            f"--held-out must be from {COUNT}, of which the right response is one, to {most}, for --data has "
            f"{most + 1} records, got {count}"
        )
    drawn = set(torch.randperm(len(material.train), generator=torch.Generator().manual_seed(0))[:count].tolist())
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for number, example in enumerate(material.train):
        parts[number in drawn].append(example)
    return replace(material, train=parts[False], held_out=parts[True])


# -- what is written

HEADS = ("", "rate", "steps", "loss", "accuracy", "seconds", "saved", "steps/s", "GiB", "trained", "omitted")
SHOWN = ("", "steps", "loss", "accuracy", "seconds", "GiB")
"""What a console has room for."""


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each method, the mean over its seeds and, of several, their standard deviation."""
    lines = []
    pace = [row["seconds"] for row in rows if row["name"] == PACE and "seconds" in row]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        if failed := [row["failed"] for row in mine if "failed" in row]:
            lines.append([name, f"failed: {' '.join(failed[0].split())[:80]}", *[""] * (len(HEADS) - 2)])
        mine = [row for row in mine if "failed" not in row]
        if not mine:
            continue
        seconds = [row["seconds"] for row in mine if "seconds" in row]
        saved = f"{1 - statistics.mean(seconds) / statistics.mean(pace):.1%}" if seconds and pace else ""
        left_out = ", ".join(f"{share:.3f} {kind}" for kind, share in mine[0].get("omitted", {}).items())
        trained = "".join(f"{row['trained parameters']:,}" for row in mine[:1] if "trained parameters" in row)
        rates = [f"{row['learning rate']:g}" for row in mine[:1] if "learning rate" in row]
        cells = ["".join(rates), spread(mine, "steps", 0), spread(mine, "loss", 4)]
        cells += [spread(mine, "accuracy", 3), spread(mine, "seconds", 2), saved, spread(mine, "steps per second", 2)]
        cells += [spread(mine, "peak GiB", 2), trained, left_out]
        lines.append([name, *cells])
    return lines


def spread(rows: Sequence[Row], figure: str, digits: int) -> str:
    """Mean ± standard deviation over seeds; empty where there is nothing."""
    values = [row[figure] for row in rows if row.get(figure) is not None]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def write(
    out: Path, rows: Sequence[Row], *, args: argparse.Namespace, material: Material, about: dict[str, str]
) -> None:
    """Every run so far in ``out``, and as a table beside it, .md."""
    records = {"learnt": len(material.train), "held out": len(material.held_out)}
    found = {"about": about, "methods": args.methods, "records": records, "rows": list(rows)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = [HEADS, ["---", *["---:"] * (len(HEADS) - 1)], *table(rows)]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    said = "\n".join(f"- {name}: {value}" for name, value in about.items())
    notes = (
        f"{records['held out']} records judge, {records['learnt']} are learnt from. loss: nats a token of a response. "
        "accuracy: one of four is right. saved: of full's seconds. GiB: the most that was allocated at once. omitted: "
        f"of SAT's first step, after quotas. ± is over {len(args.seeds)} seeds."
    )
    out.with_suffix(".md").write_text(f"{text}\n\n{notes}\n\n{said}\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"sft_methods: {error}")
