#!/usr/bin/env python3
"""Supervised fine-tuning with transformers' Trainer: full, SAT, SPDF, LoRA, (IA)³ or SpIEL, from a model to another.

    sft_hf.py --model DIR --data FILE.. --valid-data FILE.. --save DIR --method sat [--deepspeed FILE]
    torchrun --nproc-per-node 8 sft_hf.py ...

Instruction records (alpaca, sharegpt, messages, prompt/response; jsonl, also .gz .xz .zst) are written with the
tokenizer's chat template; the loss is that of the responses. The defaults are the paper's fine-tuning: batch 128, three
epochs, cosine from 1e-5, and for SAT r = .96 for the first half of the steps, dense for the second (L = 1). The
baselines have the settings of their sources. At the end the model is saved, and DIR/report.json and the console say
what held-out responses cost it, what time the training took, and how much memory. See docs/hf.md.
"""

import argparse
import json
import math
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments, set_seed

from examples.sft_hf_methods import LEARNING_RATES, MadeWith, Prepared, add_flags, build_model, settle
from megatron_sat.checkpoint.hf_files import copy_beside
from megatron_sat.data.jsonl import Lines, find_inputs
from megatron_sat.data.sft_encode import ChatOptions, encode_examples, read, told
from megatron_sat.data.sft_template import Template, build_template
from megatron_sat.data.side_file import Totals
from megatron_sat.data.tokenizer import NO_TOKEN, tokenizer_of_folder
from megatron_sat.log import say

NOT_LEARNT = -100  # transformers' label of a token that is in no loss
Example = dict[str, Tensor]
COUNTS = (
    *("pad_to_multiple_of", "epochs", "train_iters", "global_batch_size", "micro_batch_size"),
    *("log_interval", "save_interval", "lora_rank", "spdf_until"),
)
"""Flags that are at least 1 where they are given; other ranges are said by what reads them."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """One fine-tuning; returns the report. Raises ValueError for what cannot be done, before the first step."""
    args = read_flags(argv)
    material = read_material(args)
    steps = args.train_iters or args.epochs * math.ceil(len(material.train) / args.global_batch_size)
    trainer, prepared = build_trainer(args, material, steps=steps)
    result = trainer.train(resume_from_checkpoint=args.resume)
    seconds = "seconds" if args.resume is None else "seconds since the resume"
    report = {
        "method": args.method,
        "steps": steps,
        "examples": len(material.train),
        "trained parameters": trained_parameters(prepared.model),
        "held-out loss": response_loss(trainer, material.held_out, batch=args.micro_batch_size),
        seconds: round(result.metrics["train_runtime"], 3),
        "peak memory": peak_memory(),
        "settings": {name: str(value) for name, value in vars(args).items() if value is not None},
    }
    save(trainer, prepared, args=args)
    if trainer.is_world_process_zero():
        (args.save / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name in ("held-out loss", seconds, "peak memory"):
        say(f"{name}: {report[name]}")
    return report


@dataclass(frozen=True, kw_only=True)
class Material:
    """What is learnt, what judges it, and the token that fills batches up."""

    train: list[Example]
    held_out: list[Example]
    fill: int
    multiple: int = 1
    """Of which the length of a batch that is learnt is one."""


def read_material(args: argparse.Namespace) -> Material:
    """The records of --data and --valid-data, in the model's tokens. Raises ValueError that names file and line."""
    tokenizer = tokenizer_of_folder(args.model)
    template = build_template(args.template, tokenizer=tokenizer)
    return Material(
        train=read_examples(args.data, template=template, max_tokens=args.max_tokens, said="--data"),
        held_out=read_examples(args.valid_data, template=template, max_tokens=args.max_tokens, said="--valid-data"),
        fill=tokenizer.pad if tokenizer.pad != NO_TOKEN else tokenizer.eod,
        multiple=args.pad_to_multiple_of,
    )


def build_trainer(args: argparse.Namespace, material: Material, *, steps: int) -> tuple[Trainer, Prepared]:
    """The Trainer of ``steps`` updates, and the model in it. The order of the examples is that of --seed alone.

    Raises ValueError for what cannot be combined.
    """
    made_with = MadeWith(args, steps=steps, learnt=material.train)
    if args.resume is not None:
        made_with.refuse_other(Path(args.resume))
    arguments = trainer_arguments(args, steps=steps)  # before the model: ZeRO-3 reads it in shards
    set_seed(args.seed)  # LoRA's A is random
    prepared = build_model(args, steps=steps)
    trainer = Trainer(
        prepared.model,
        arguments,
        train_dataset=material.train,  # type: ignore[arg-type]  # whatever can be indexed
        data_collator=lambda examples: collate(examples, fill=material.fill, multiple=material.multiple),
        callbacks=[*prepared.callbacks, made_with],
        optimizers=(prepared.optimizer, None),
    )
    return trainer, prepared


# -- flags


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; flags of another method are an error, those of this one have their defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama, Mistral, Qwen2 or Qwen3 model")
    parser.add_argument("--data", nargs="+", required=True, help="instruction records to learn")
    parser.add_argument("--valid-data", nargs="+", required=True, help="instruction records to be judged by")
    parser.add_argument("--save", type=Path, required=True, help="folder for checkpoints, the model and report.json")
    parser.add_argument("--method", choices=tuple(LEARNING_RATES), required=True)
    parser.add_argument("--template", default="tokenizer", help="tokenizer, alpaca, plain, or a chat template's file")
    parser.add_argument("--max-tokens", type=int, default=2048, help="longer examples are cut off")
    parser.add_argument(
        "--pad-to-multiple-of",
        type=int,
        default=64 if torch.cuda.is_available() else 1,
        help="of a batch's length: a GPU takes a while over each length that is new to it; 64 there, else 1",
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train-iters", type=int, help="updates, in place of --epochs")
    parser.add_argument("--global-batch-size", type=int, default=128, help="examples of an update")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="examples of a forward")
    parser.add_argument("--lr", type=float, help=f"the highest; without it {LEARNING_RATES}")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16; weights stay fp32")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--deepspeed", type=Path, help="DeepSpeed's configuration, passed through")
    parser.add_argument("--log-interval", type=int, default=1, help="steps between losses in the log")
    parser.add_argument("--save-interval", type=int, help="steps between checkpoints; none without")
    parser.add_argument("--resume", type=str, help="a checkpoint's folder")
    add_flags(parser)
    args = parser.parse_args(argv)
    for name in COUNTS:
        count = getattr(args, name)
        if count is not None and count < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {count}")
    settle(args, parser=parser)
    return args


def trainer_arguments(args: argparse.Namespace, *, steps: int) -> TrainingArguments:
    """Trainer's settings. Raises ValueError where batches do not divide, or processes are not as GPUs."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    together = args.micro_batch_size * world
    if args.global_batch_size % together:
        raise ValueError(
            f"--global-batch-size ({args.global_batch_size}) must be a multiple of --micro-batch-size times the "
            f"processes ({args.micro_batch_size} x {world}); try {-(-args.global_batch_size // together) * together}"
        )
    arguments = TrainingArguments(
        str(args.save),
        max_steps=steps,
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.global_batch_size // together,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        gradient_checkpointing=args.recompute,
        bf16=args.bf16,
        seed=args.seed,
        deepspeed=None if args.deepspeed is None else str(args.deepspeed),
        save_strategy="no" if args.save_interval is None else "steps",
        save_steps=args.save_interval or 1,
        logging_steps=args.log_interval,
        logging_nan_inf_filter=False,  # it hides them, and waits for the GPU in every step to see them
        report_to=[],
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        use_cpu=not torch.cuda.is_available() and args.deepspeed is None,  # it would switch DeepSpeed off
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:  # the Trainer would multiply the batch by them
        raise ValueError(
            f"--method {args.method} needs a process for each GPU, this one has {arguments.n_gpu}, which would be "
            f"DataParallel's threads; start it with torchrun --nproc-per-node {arguments.n_gpu}, or show it one GPU by "
            "CUDA_VISIBLE_DEVICES"
        )
    if arguments.world_size != world:
        raise ValueError(
            f"--deepspeed must have a GPU for each of the {world} processes, accelerate knows of "
            f"{arguments.world_size}; leave it out, and DDP is used, on a CPU too"
        )
    return arguments


# -- data


def read_examples(files: Sequence[str], *, template: Template, max_tokens: int, said: str) -> list[Example]:
    """Every record as {"input_ids": [s], "labels": [s]}; says what was cut off or left out.

    Raises ValueError that names file and line.
    """
    examples, count = list[Example](), Totals()
    for path in find_inputs(files, said=said):
        encoded = encode_examples(list(Lines(path)), template=template, options=ChatOptions(max_tokens=max_tokens))
        if encoded.error is not None:
            number, problem = encoded.error
            raise ValueError(f"{path}, line {number + 1}, must be an instruction record, it is {problem}; mend it")
        count.add(encoded.totals)
        for stored in torch.from_numpy(encoded.tokens).split(encoded.lengths.tolist()):
            ids, learnt = (torch.from_numpy(found) for found in read(stored.numpy()))
            examples.append({"input_ids": ids, "labels": ids.masked_fill(~learnt, NOT_LEARNT)})
    if not examples:
        raise ValueError(f"{said} must hold at least one example with a response, it holds none; check the files")
    say(f"{said}: {told(count)}")
    return examples


def collate(examples: Sequence[Example], *, fill: int, multiple: int = 1) -> Example:
    """[b, s] of the longest example's length, up to the next ``multiple``; filling is masked out and in no loss."""
    ids = pad_sequence([example["input_ids"] for example in examples], batch_first=True, padding_value=fill)
    labels = pad_sequence([example["labels"] for example in examples], batch_first=True, padding_value=NOT_LEARNT)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    more = (0, -ids.size(1) % multiple)
    ids, labels = F.pad(ids, more, value=fill), F.pad(labels, more, value=NOT_LEARNT)
    mask = torch.arange(ids.size(1)) < lengths[:, None]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}


# -- what came of it


@torch.no_grad()
def response_loss(trainer: Trainer, examples: Sequence[Example], *, batch: int) -> float:
    """Nats a response token over all examples, which the processes share; each makes as many forwards."""
    model, device = trainer.model_wrapped, trainer.args.device
    model.eval()
    rank, world = trainer.args.process_index, trainer.args.world_size
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(0, math.ceil(len(examples) / world), batch):
        mine = range(first * world + rank, (first + batch) * world, world)
        found = [examples[number] for number in mine if number < len(examples)]
        inputs = collate(found or examples[:1], fill=0)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        labels = inputs.pop("labels")[:, 1:]
        with trainer.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits[:, :-1]
        if found:  # else only the others needed this forward
            lost = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            sums += torch.stack([lost.double(), (labels != NOT_LEARNT).sum().double()])
    if world > 1:
        dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def trained_parameters(model: Any) -> int:
    """How many entries are trained, also where ZeRO-3 has left a shard of each parameter here."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters() if p.requires_grad)


def peak_memory() -> str:
    """The most this process has held: on its GPU, or, without one, in the machine's memory."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory"


def save(trainer: Trainer, prepared: Prepared, *, args: argparse.Namespace) -> None:
    """The model in --save, plain, and the tokenizer's files as they are; of LoRA and (IA)³ the learned part too, in
    adapter/."""
    if args.method in ("lora", "ia3"):
        trainer.save_model(str(args.save / "adapter"))
    sharded = any(hasattr(parameter, "ds_shape") for parameter in prepared.model.parameters())
    if prepared.plain is not None and sharded:
        say("the model lies in shards: merge the adapter with peft's merge_and_unload after loading both")
        return
    if trainer.is_world_process_zero() and args.save.resolve() != args.model.resolve():
        copy_beside(args.model, args.save)  # before the model, whose own configuration is written over it
    if prepared.plain is None:
        trainer.save_model(str(args.save))
    elif trainer.is_world_process_zero():
        plain: Any = prepared.plain()
        plain.save_pretrained(args.save)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"sft_hf: {error}")
