#!/usr/bin/env python3
"""Import a Hugging Face model, export it again, and prove that both sides compute the same.

    convert_checkpoint.py import --hf DIR --save DIR [--tensor-model-parallel-size N]
    convert_checkpoint.py export --load DIR --hf DIR [--ckpt-step N] [--like DIR]
    torchrun --nproc-per-node 4 convert_checkpoint.py verify --load DIR --hf DIR
    convert_checkpoint.py unpack --gguf FILE --hf DIR

docs/convert.md says what is written where, which models are known, and what the gate compares.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sat import cpu, log

log.quiet_libraries()
cpu.install()  # before anything of megatron is imported; nothing with a GPU

import torch

from megatron_sat import distributed
from megatron_sat.checkpoint.hf_files import whole_folder
from megatron_sat.checkpoint.hf_model import unpack_gguf
from megatron_sat.convert.conversion import export_model, import_model, verify_model
from megatron_sat.convert.opening import DTYPES

USAGE_ERROR = 2
_TIMEOUT_MINUTES = 120


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for. Returns the exit code; 2 for what cannot be done, said on stderr."""
    args = _parser().parse_args(argv)
    launch = distributed.read_launch()
    try:
        args.work(args)
    except (ValueError, OSError) as error:
        if launch.rank == 0:
            sys.stderr.write(f"convert_checkpoint.py: {error}\n")
        return USAGE_ERROR
    finally:
        distributed.leave()
    return 0


def _import(args: argparse.Namespace) -> None:
    import_model(
        args.hf,
        args.save,
        tp=args.tensor_model_parallel_size,
        divisible_by=args.make_vocab_size_divisible_by,
        dtype=args.dtype,
        gate=None if args.skip_gate else args.gate,
    )


def _export(args: argparse.Namespace) -> None:
    export_model(
        args.load,
        args.hf,
        step=args.ckpt_step,
        like=args.like,
        dtype=args.dtype,
        max_shard_bytes=int(args.max_shard_gb * 10**9),
        gate=None if args.skip_gate else args.gate,
    )


def _verify(args: argparse.Namespace) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.join(distributed.read_launch(), backend=backend, timeout_minutes=_TIMEOUT_MINUTES)
    verify_model(args.load, args.hf, dtypes=args.gate.split(","), step=args.ckpt_step)


def _unpack(args: argparse.Namespace) -> None:
    with whole_folder(args.hf, said="--hf") as draft:
        unpack_gguf(args.gguf, draft)
    log.say(f"unpacked {args.gguf} to {args.hf}, in fp32")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    kinds = parser.add_subparsers(required=True, metavar="{import,export,verify,unpack}")

    one = kinds.add_parser("import", help="Hugging Face to Megatron", allow_abbrev=False)
    one.add_argument("--hf", type=Path, required=True, help="the model's folder (safetensors), or a GGUF file")
    one.add_argument("--save", type=Path, required=True, help="a new folder")
    one.add_argument("--tensor-model-parallel-size", type=int, default=1, help="pad the vocabulary for it")
    one.add_argument("--make-vocab-size-divisible-by", type=int, default=128, help="times the tensor-parallel size")
    one.set_defaults(work=_import)

    back = kinds.add_parser("export", help="Megatron to Hugging Face", allow_abbrev=False)
    back.add_argument("--load", type=Path, required=True, help="folder of an imported model or of a run")
    back.add_argument("--hf", type=Path, required=True, help="a new folder")
    back.add_argument("--ckpt-step", type=int, help="which checkpoint; without it the newest")
    back.add_argument("--like", type=Path, help="folder with config.json and tokenizer; without it what import kept")
    back.add_argument("--max-shard-gb", type=float, default=5.0, help="largest file, in 10^9 bytes")
    back.set_defaults(work=_export)

    same = kinds.add_parser("verify", help="compare, in all layouts that the ranks allow", allow_abbrev=False)
    same.add_argument("--load", type=Path, required=True, help="folder of an imported model or of a run")
    same.add_argument("--hf", type=Path, required=True, help="the model's folder (safetensors)")
    same.add_argument("--ckpt-step", type=int, help="which checkpoint; without it the newest")
    same.add_argument("--gate", default="fp32", help="precisions to compare in, such as fp32,bf16")
    same.set_defaults(work=_verify)

    loose = kinds.add_parser("unpack", help="a GGUF file to a Hugging Face folder, in fp32", allow_abbrev=False)
    loose.add_argument("--gguf", type=Path, required=True, help="the file")
    loose.add_argument("--hf", type=Path, required=True, help="a new folder")
    loose.set_defaults(work=_unpack)

    for command in (one, back):
        command.add_argument("--dtype", choices=sorted(DTYPES), help="convert the weights; without it they stay")
        command.add_argument("--gate", choices=("bf16", "fp32"), default="fp32", help="precision of the comparison")
        command.add_argument("--skip-gate", action="store_true", help="compare nothing, record no loss")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
