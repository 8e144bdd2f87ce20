#!/usr/bin/env python3
"""The demo: a tiny Llama learns English, gets Chinese pieces into its vocabulary, and goes on with Chinese three times.

    run.py [--quick] [--out DIR] [--fresh]

Dense, SAT, and dense for as long as SAT took, each on two ranks (TP=2; one with --quick) of this machine's CPU,
evaluated in both languages before and after; DIR/report.html says what came of it. After its English beginning this
is the trip of examples/adapt_chinese.sh. Stages that are done are kept, so an interrupted demo goes on.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from examples.adapt.driver import ROOT, TEXT, go, read_recipe, settings_of, workshop, write_training
from megatron_sat.compare.stages import Stage
from megatron_sat.compare.workshop import Workshop, end_well
from megatron_sat.trip.course import Course
from megatron_sat.trip.text import OLD, Text, find_text

TOKENIZER = TEXT / OLD / "tokenizer.model"
NOTES = ("So small a model has nothing to spare for Chinese: this shows what is done, not what it is worth.",)


def english_stages(out: Path, *, english: Mapping[str, Any], text: Text, shop: Workshop) -> tuple[Stage, ...]:
    """Text, training and export of the English model; the last one's folder has it, in model/."""
    files = {split: list(text.files[OLD, split].values()) for split in ("train", "dev")}
    tokens = shop.prepare(out / "english-text", files, tokenizer=TOKENIZER)
    data = tokens.folder / "data"
    run = shop.training(
        "English model",
        out / "english",
        *("--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", shop.named(TOKENIZER)),
        *("--train-data-path", f"{OLD}={shop.named(data / 'train')}"),
        *("--valid-data-path", f"{OLD}={shop.named(data / 'dev')}"),
        *("--data-cache-path", shop.named(out / "index-cache"), "--save", shop.named(out / "english")),
        ranks=english["tensor_model_parallel_size"],
        configs=[write_training(english, out, name="english.yaml")],
        after=[tokens],
    )
    folder = out / "english-model"
    command = ("tools/convert_checkpoint.py", "export", "--load", shop.named(run.folder))
    export = shop.stage("English export", folder, *command, "--hf", shop.named(folder / "model"), after=[run])
    return (tokens, run, export)


def demo(out: Path, *, quick: bool, data: Path = TEXT) -> Course:
    """The trip of the demo. data: folder of the text."""
    recipe = read_recipe(HERE / ("quick.yaml" if quick else "demo.yaml"), more=["english"])
    shop, text = workshop(jobs=None), find_text(data)
    before = english_stages(out, english=recipe["english"], text=text, shop=shop)
    return Course(
        shop=shop,
        settings=settings_of(recipe),
        training=write_training(recipe["training"], out),
        text=text,
        model=before[-1].folder / "model",
        before=before,
        out=out,
    )


def main(argv: Sequence[str]) -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps: two minutes")
    parser.add_argument("--out", type=Path, help="folder of everything (default: runs/demo, runs/demo-quick)")
    parser.add_argument("--data", type=Path, default=TEXT, help="text in the layout of what is shipped (default: that)")
    parser.add_argument("--fresh", action="store_true", help="run stages again that are done")
    args = parser.parse_args(argv)
    out = (args.out or ROOT / "runs" / ("demo-quick" if args.quick else "demo")).resolve()
    dry = os.environ.get("DRY_RUN", "") not in ("", "0")
    command = ["examples/demo/run.py", *argv]
    course = demo(out, quick=args.quick, data=args.data.resolve())
    go(course, dry=dry, fresh=args.fresh, command=command, notes=NOTES)


if __name__ == "__main__":
    end_well("demo", main)
