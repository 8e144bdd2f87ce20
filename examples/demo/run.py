#!/usr/bin/env python3
"""The demo: a tiny Llama learns English, then goes on with Chinese three times from the same checkpoint.

    run.py [--quick] [--out DIR] [--fresh]

Dense, SAT, and dense for as long as SAT took, each on two ranks (TP=2) of this machine's CPU; DIR/report.md
and DIR/curves.png say what came of it. Stages that are done are kept, so an interrupted demo goes on.
"""

import argparse
import os
import platform
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from megatron_sat.compare.curves import draw_curves
from megatron_sat.compare.report import Challenge, Comparison, columns, markdown, rows, verdicts
from megatron_sat.compare.runs import read_run, steps_that_fit
from megatron_sat.compare.stages import MARKER, Stage, run_stage
from megatron_sat.data.side_file import read_side_file
from megatron_sat.log import say, table

TEXT = HERE.parent / "data"
TOKENIZER = TEXT / "tokenizer.model"
LANGUAGES = ("zh", "en")
TITLE = "Dense, SAT, and dense for SAT's time"
PROGRESS = re.compile(r"step +\d+ \||.*: [\d,]+ documents, ")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large the demo is."""

    config: Path
    """Model, batch and optimizer of all runs."""
    english_steps: int
    """Of the model that the others go on with."""
    chinese_steps: int
    """T of dense and SAT; a multiple of 3."""

    @property
    def sat(self) -> tuple[str, ...]:
        """The paper's continual pre-training: r = 0.5 for two thirds of the steps, then five rungs down."""
        ladder = ("--sat-schedule", "ladder", "--sat-omission-rate", "0.5", "--sat-rungs", "5")
        return (*ladder, "--sat-schedule-start", str(self.chinese_steps * 2 // 3))


FULL = Plan(config=HERE / "demo.yaml", english_steps=420, chinese_steps=420)
QUICK = Plan(config=HERE / "quick.yaml", english_steps=30, chinese_steps=30)


def named(path: Path) -> str:
    """A path as commands say it: they run in the project's folder."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def text_stage(out: Path, language: str, split: str) -> Stage:
    """Token ids of one language's ``split`` (train, dev)."""
    folder = out / f"{language}-{split}"
    files = sorted((TEXT / language).glob(f"*.{split}.jsonl.xz"))
    command = (
        *(sys.executable, "tools/preprocess_data.py", "--input", *map(named, files)),
        *(
            "--tokenizer-type",
            "SentencePieceTokenizer",
            "--tokenizer-model",
            named(TOKENIZER),
            "--append-eod",
        ),
        *("--output-prefix", named(folder / "data")),
    )
    reads = (*files, TOKENIZER)
    return Stage(name=f"{language} text, {split}", folder=folder, command=command, reads=reads, made_with=made_with())


def prefix(stage: Stage) -> str:
    """Where a text stage's data set is."""
    return named(stage.folder / "data_text_document")


def training_stage(
    out: Path, name: str, *, plan: Plan, steps: int, train: Sequence[str], after: tuple[Stage, ...]
) -> Stage:
    """A run of ``steps`` steps, validated on both languages. train: flags of what it reads, and how."""
    folder = out / name
    dev = [f"{language}={prefix(text_stage(out, language, 'dev'))}" for language in LANGUAGES]
    command = (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("pretrain_sat.py", "--config", named(plan.config), "--tokenizer-model", named(TOKENIZER)),
        *("--train-iters", str(steps), "--valid-data-path", *dev, *train),
        *("--data-cache-path", named(out / "index-cache"), "--save", named(folder)),
    )
    return Stage(name=name, folder=folder, command=command, reads=(plan.config,), made_with=made_with(), after=after)


def made_with() -> str:
    """The machine and the libraries: results of others are made again."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    return f"{len(os.sched_getaffinity(0))} CPU cores; {libraries}, Python {platform.python_version()}"


def run(stage: Stage) -> Path:
    """The folder of the stage, done now or before."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # one core a rank
    run_stage(stage, environment=environment, shown=is_progress, working_folder=ROOT)
    return stage.folder


def is_progress(line: str) -> bool:
    """Whether the console shows this line of a stage; all are in its folder's log.txt."""
    return bool(PROGRESS.match(line))


def compare(plan: Plan, out: Path) -> Comparison:
    """Run every stage that is not done, and read the runs."""
    text = {(lang, split): text_stage(out, lang, split) for lang in LANGUAGES for split in ("train", "dev")}
    for stage in text.values():
        run(stage)

    def train(name: str, steps: int, *flags: str, after: tuple[Stage, ...] = tuple(text.values())) -> Stage:
        stage = training_stage(out, name, plan=plan, steps=steps, train=flags, after=after)
        run(stage)
        return stage

    train_zh, train_en = (f"{language}={prefix(text[language, 'train'])}" for language in LANGUAGES)
    english = train("english", plan.english_steps, "--train-data-path", train_en)
    chinese = (
        *("--train-data-path", train_zh, "--replay-data-path", train_en, "--replay-share", "0.2"),
        *("--load", named(english.folder), "--finetune"),
    )
    dense = train("dense", plan.chinese_steps, *chinese, after=(english,))
    sat = train("sat", plan.chinese_steps, *chinese, *plan.sat, after=(english,))
    reference, candidate = read_run(dense.folder, name="dense"), read_run(sat.folder, name="SAT")
    fitting = steps_that_fit(reference, seconds=candidate.seconds)
    control = train("dense-for-sats-time", fitting, *chinese, after=(english,))
    return Comparison(
        start=read_run(english.folder, name="English only"),
        reference=reference,
        challenges=(Challenge(candidate=candidate, control=read_run(control.folder, name="dense for SAT's time")),),
        domains=LANGUAGES,
        tokens_per_character={language: density(text[language, "dev"]) for language in LANGUAGES},
    )


def density(stage: Stage) -> float:
    """Tokens a character of prepared text, ends of documents counted in."""
    side = read_side_file(str(ROOT / prefix(stage)))
    assert side is not None  # the stage is done
    return side.totals.tokens / side.totals.characters


def report(comparison: Comparison, out: Path) -> None:
    """report.md and curves.png in ``out``, and the same on the console."""
    notes = [
        f"Two ranks (TP=2) on {made_with()}.",
        "SAT: omission rate 0.5 for two thirds of the steps, then the ladder. Every fifth sample is English.",
    ]
    draw_curves(comparison, out / "curves.png")
    page = markdown(comparison, title=TITLE, notes=notes, picture="curves.png")
    (out / "report.md").write_text(page)
    heads, *lines = zip(columns(comparison), *rows(comparison), strict=True)  # a column a run: 80 characters
    table(TITLE, heads, lines)
    for sentence in verdicts(comparison):
        say(f"- {sentence}")
    say(f"{named(out / 'report.md')} holds this, {named(out / 'curves.png')} the curves")


def main(argv: Sequence[str]) -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps: two minutes")
    parser.add_argument("--out", type=Path, help="folder of everything (default: runs/demo, runs/demo-quick)")
    parser.add_argument("--fresh", action="store_true", help="run stages again that are done")
    args = parser.parse_args(argv)
    out = (args.out or ROOT / "runs" / ("demo-quick" if args.quick else "demo")).resolve()
    if args.fresh:
        for marker in out.glob(f"*/{MARKER}"):
            marker.unlink()
    report(compare(QUICK if args.quick else FULL, out), out)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # however it is stopped, the ranks are stopped too
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; the same command goes on where it was")
