#!/usr/bin/env python3
"""Perplexity, bits per byte and bits per character of a model, per domain.

    tools/evaluate.py --hf DIR --data zh/poetry=zh.poetry.jsonl en/news=prepared --output NEW
    torchrun --nproc-per-node 4 tools/evaluate.py --load DIR --tensor-model-parallel-size 2 --data ...

docs/evaluation.md says what is measured, how texts are cut into windows, and what is written.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()  # before anything of megatron is imported; nothing with a GPU

import torch

from megatron_sat import distributed
from megatron_sat.evaluate.result import Result
from megatron_sat.evaluation.job import evaluate, output_folder, show, write
from megatron_sat.evaluation.models import Subject, hugging_face_model, megatron_model
from megatron_sat.evaluation.tasks import run_tasks
from megatron_sat.evaluation.texts import Limits, parse_data

USAGE_ERROR = 2
_TIMEOUT_MINUTES = 120
_PATIENCE_SECONDS = 30.0


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for. Returns the exit code; 2 for what cannot be done, said on stderr."""
    args = _parser().parse_args(argv)
    launch = distributed.read_launch()
    try:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        distributed.join(launch, backend=backend, timeout_minutes=_TIMEOUT_MINUTES)
        _evaluate(args)
    except (ValueError, OSError) as error:
        if launch.rank == 0:
            sys.stderr.write(f"evaluate.py: {error}\n")
        return USAGE_ERROR
    finally:
        distributed.leave(patience_seconds=_PATIENCE_SECONDS)
    return 0


def _evaluate(args: argparse.Namespace) -> None:
    _check(args)
    beside = [Result.load(path) for path in args.beside]
    data = parse_data(args.data)
    limits = Limits(documents=args.max_documents, characters=args.max_characters)
    subject = _subject(args)
    with ExitStack() as stack:
        draft = None if args.output is None else stack.enter_context(output_folder(args.output))
        if args.harness:
            assert draft is not None  # one rank, and a folder: `_check`
            run_tasks(
                subject,
                tasks=args.harness,
                tasks_folder=args.harness_tasks_folder,
                limit=args.harness_limit,
                batch_size=args.harness_batch_size,
                output=draft,
            )
        if not data:
            return
        result = evaluate(
            subject,
            data,
            name=args.name or subject.folder.resolve().name,
            key=args.json_key,
            seq_length=args.seq_length,
            stride=args.stride,
            dtype=args.dtype,
            limits=limits,
            micro_batch_size=args.micro_batch_size,
            beside=beside,
        )
        show([*beside, result])
        if draft is not None:
            write([*beside, result], draft)
    if args.output is not None:
        log.say(f"written to {args.output}")


def _check(args: argparse.Namespace) -> None:
    if args.hf is not None:
        for flag in _OF_CHECKPOINTS:
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag.replace('_', '-')} needs --load, got --hf; leave it out")
    if not args.data and not args.harness:
        raise ValueError("an evaluation needs --data or --harness, got neither; name texts with --data NAME=PATH")
    if args.harness and args.output is None:
        raise ValueError("--harness needs --output, got none; name a new folder for harness.json")
    ranks = distributed.read_launch().world_size
    if args.harness and ranks != 1:
        raise ValueError(f"--harness is the work of one process, got {ranks} ranks; start without torchrun")


def _subject(args: argparse.Namespace) -> Subject:
    if args.hf is not None:
        return hugging_face_model(args.hf)
    return megatron_model(
        args.load,
        step=args.ckpt_step,
        tp=1 if args.tensor_model_parallel_size is None else args.tensor_model_parallel_size,
        pp=1 if args.pipeline_model_parallel_size is None else args.pipeline_model_parallel_size,
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
    )


_OF_CHECKPOINTS = (
    "ckpt_step",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "tokenizer_type",
    "tokenizer_model",
)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--load", type=Path, help="folder of an imported model or of a run")
    which.add_argument("--hf", type=Path, help="a Hugging Face model's folder (safetensors)")
    add("--ckpt-step", type=int, help="which checkpoint of --load; without it the newest")
    add("--tensor-model-parallel-size", type=int, help="of --load (default: 1)")
    add("--pipeline-model-parallel-size", type=int, help="of --load (default: 1)")
    add("--tokenizer-type", help="of --load, where the checkpoint does not say")
    add("--tokenizer-model", help="of --load: where its tokenizer is now, if it has moved")
    add("--data", nargs="+", default=[], metavar="NAME=PATH", help="jsonl (.gz .xz .zst, globs) or prepared data")
    add("--json-key", default="text", help="the field that holds the text (default: text)")
    add("--seq-length", type=int, help="tokens of a window (default: 2048, or the model's positions)")
    add("--stride", type=int, help="tokens from a window to the next (default: half of --seq-length)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of the model (default: fp32)")
    add("--max-documents", type=int, help="of a domain, from its beginning (default: all)")
    add("--max-characters", type=int, help="of a domain: whole documents until so many are reached (default: all)")
    add("--micro-batch-size", type=int, default=4, help="windows side by side (default: 4)")
    add("--name", help="what table and chart call the model (default: its folder's name)")
    add("--beside", type=Path, nargs="+", default=[], metavar="RESULT", help="earlier result.json to show beside")
    add(
        "--harness", nargs="+", default=[], metavar="TASK", help="tasks or groups of lm-eval, on the Hugging Face model"
    )
    add("--harness-tasks-folder", type=Path, help="YAML files of further tasks")
    add("--harness-limit", type=int, help="documents a task (default: all)")
    add("--harness-batch-size", type=int, default=8, help="of lm-eval (default: 8)")
    add("--output", type=Path, help="a new folder for result.json, table.md, chart.png, harness.json")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
