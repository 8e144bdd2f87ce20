#!/usr/bin/env python3
"""Variants of training beside dense training, at equal wall-clock: run them all, report, judge, remember.

    tools/compare.py run FILE.yaml --out DIR [--seeds 1 2 3] [--gpus 4]
                         [--require "sat.zh_bpc <= dense_equal_time.zh_bpc + 0.005"]
    tools/compare.py history [--figure zh_bpc] [--variant sat] [--out trend.png]

FILE names model, data, budget, common settings, seeds and variants (docs/compare.md). What is done is kept, so the same
command goes on where it was. The exit code of `run` is 1 where a requirement does not hold, after the report is
written, and 2 where something went wrong.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()  # before anything of megatron is imported; nothing with a GPU

from megatron_sat.cli import Loader
from megatron_sat.compare.claim import claimed, make_folder
from megatron_sat.compare.conduct import Conduct
from megatron_sat.compare.devices import alike, check_count, visible_devices
from megatron_sat.compare.experiment import CONTROLS, Experiment, experiment_from, with_seeds
from megatron_sat.compare.history import Entry, append, open_store, trend
from megatron_sat.compare.lab import Lab
from megatron_sat.compare.pictures import draw_trend
from megatron_sat.compare.provenance import Provenance, provenance
from megatron_sat.compare.requirement import Verdict, check, judge, without_bits
from megatron_sat.compare.stages import Runner
from megatron_sat.compare.study import Study, figure_names, group_names, language_figures
from megatron_sat.compare.summary import (
    cell,
    how_timed,
    in_short,
    settings_of,
    warnings,
    write_summary,
)
from megatron_sat.compare.workshop import end_well, environment_of, this_machine

HISTORY = "compare.sqlite"
BROKEN, WRONG = 1, 2
"""What the process exits with where a requirement does not hold, and where there is nothing to judge."""
PROGRESS = re.compile(r"step +\d+ \||.*: [\d,]+ documents, |imported")


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for. Returns the exit code."""
    args = _parser().parse_args(argv)
    return _run(args, argv) if args.action == "run" else _history(args)


def _run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    experiment = _read(args.file)
    if args.seeds is not None:
        experiment = with_seeds(experiment, args.seeds)
    without = tuple(dict.fromkeys(args.without_control))
    check_count(args.gpus, ranks=experiment.ranks, turns=args.turns)
    shop, environment = this_machine(ROOT, jobs=args.jobs), environment_of(os.environ)
    lab = Lab(shop=shop, experiment=experiment, out=args.out.resolve())
    groups, figures = (names(experiment, left_out=without) for names in (group_names, figure_names))
    figures = without_bits(figures, domains=_uncounted(lab), old=experiment.old)
    for text in args.require:
        check(text, groups=groups, figures=figures)
    several = args.gpus > 1
    gpus = alike(visible_devices(environment, python=shop.python), count=args.gpus) if several else ()
    runner = Runner(
        environment=environment,
        shown=lambda line: bool(PROGRESS.match(line)),
        working_folder=ROOT,
        jobs=args.jobs,
    )
    conduct = Conduct(lab=lab, runner=runner, without=without, gpus=gpus, turns=args.turns)
    if args.dry_run:
        make_folder(lab.out, flag="--out")
        conduct.rehearse()
        return 0
    history = args.history or lab.out.parent / HISTORY
    with claimed(lab.out):
        with open_store(history, writes=True):
            pass  # what cannot be written to is known before training
        study = conduct.study()
        verdicts = [judge(text, study) for text in args.require]
        settings = settings_of(experiment, named=shop.named)
        told = provenance(ROOT, command=" ".join(["tools/compare.py", *argv]))
        write_summary(study, args.out, told=told, settings=settings, verdicts=verdicts)
        fresh = append(history, _entry(study, told=told, settings=settings))
    _conclude(study, args.out, verdicts=verdicts)
    log.say(f"{history} {'now remembers this' if fresh else 'remembered this already'}")
    return 0 if all(verdict.holds for verdict in verdicts) else BROKEN


def _read(path: Path) -> Experiment:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"FILE must be a readable YAML file, {path} is not: {said}; mend it") from error
    if not isinstance(content, dict):
        raise ValueError(f"FILE must hold keys with values, {path} does not; see examples/compare/small.yaml")
    return experiment_from(content, folder=path.resolve().parent, name=path.stem)


def _uncounted(lab: Lab) -> list[str]:
    """Domains of validation whose data came prepared, without what bits a character need."""
    valid = lab.experiment.valid
    given = [domain for domain, paths in valid.items() if lab.prefix(domain, held_out=True) in paths]
    return [domain for domain in given if lab.tokens_per_character(domain) is None]


def _entry(study: Study, *, told: Provenance, settings: dict[str, Any]) -> Entry:
    return Entry(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        name=study.experiment.name,
        commits="; ".join(study.commits),
        machine=told.machine,
        libraries=told.libraries,
        settings=settings,
        left_out=study.left_out,
        figures={name: study.figures[group] for name, group in study.names.items()},
    )


def _conclude(study: Study, out: Path, *, verdicts: Sequence[Verdict]) -> None:
    figures = [*language_figures(study), "steps", "seconds", "flops"]
    rows = [[group, *(cell(found[name], digits=3) for name in figures)] for group, found in study.figures.items()]
    log.table(study.experiment.name, ["", *figures], rows)
    for sentence in [*warnings(study), *how_timed(study), *in_short(study)]:
        log.say(f"- {sentence}")
    for verdict in verdicts:
        log.say(f"required: {verdict}")
    log.say(f"{out / 'report.html'} holds this and more, report.md and report.json beside it the same")


def _history(args: argparse.Namespace) -> int:
    points = trend(args.history or Path(HISTORY), figures=args.figure, variants=args.variant)
    heads = ["when", "variant", "figure", "mean ± std", "seeds", "commit", "settings"]
    rows = [
        [
            *(p.at[:16], p.variant, p.figure, cell(p.spread, digits=4), str(len(p.spread.values))),
            *(p.commits.replace(", with changes", "+"), p.settings_digest[:6]),
        ]
        for p in points
    ]
    log.table("history", heads, rows)
    for digest, name, machine in dict.fromkeys((p.settings_digest[:6], p.name, p.machine) for p in points):
        log.say(f"settings {digest}: {name}, on {machine}")
    if args.out is not None:
        make_folder(args.out.resolve().parent, flag="--out")
        draw_trend(points, args.out)
        log.say(f"drawn to {args.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="make the comparison of a file", allow_abbrev=False)
    add = run.add_argument
    add("file", type=Path, metavar="FILE", help="what is compared, YAML")
    add("--out", type=Path, required=True, help="folder of everything")
    add("--seeds", type=int, nargs="+", help="instead of the file's")
    add("--require", action="append", default=[], metavar="REQUIREMENT", help="exit with 1 unless it holds; repeatable")
    add("--without-control", action="append", default=[], metavar="NAME", help=f"{', '.join(CONTROLS)}; repeatable")
    add("--history", type=Path, help=f"the store of results (default: {HISTORY} beside DIR)")
    shared = "training runs too, over the GPUs in turn, only without dense_equal_time"
    add("--jobs", type=int, default=1, help=f"stages at once; {shared} (default: 1)")
    add("--gpus", type=int, default=1, help="training runs at once, each alone on its GPU, all of a kind (default: 1)")
    add("--turns", type=int, default=1, help="runs begun where one trains at a time, the others start up (default: 1)")
    add("--dry-run", action="store_true", help="say the commands and run none")
    past = actions.add_parser("history", help="what comparisons found, the oldest first", allow_abbrev=False)
    add = past.add_argument
    add("--history", type=Path, help=f"the store of results (default: {HISTORY} here)")
    add("--figure", action="append", default=[], help="these alone; repeatable")
    add("--variant", action="append", default=[], help="these alone; repeatable")
    add("--out", type=Path, help="a picture of the trend, .png, .svg or .pdf")
    return parser


if __name__ == "__main__":
    end_well("compare.py", main, wrong=WRONG)
