"""The methods of sft_hf.py: their flags, what each makes of a model, and what the Trainer needs for it."""

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from megatron_sat.baselines import spiel
from megatron_sat.baselines.peft import (
    IA3_LEARNING_RATE,
    LINEAR,
    LORA_LEARNING_RATE,
    LORA_RANKS,
    merged,
    with_ia3,
    with_lora,
)
from megatron_sat.baselines.spdf import RATE as SPDF_RATE
from megatron_sat.baselines.spdf import Spdf
from megatron_sat.hf import SatCallback, sparsify
from megatron_sat.sparsity.schedule import Schedule, ScheduleConfig, build_schedule
from megatron_sat.sparsity.selector import SelectionConfig

LEARNING_RATES = {
    "full": 1e-5,
    "sat": 1e-5,
    "spdf": 1e-5,
    "lora": LORA_LEARNING_RATE,
    "ia3": IA3_LEARNING_RATE,
    "spiel": spiel.LEARNING_RATE,
}
SAT_ONLY: dict[str, Any] = {
    "sat_omission_rate": Fraction(24, 25),
    "sat_schedule_start": None,
    "sat_rungs": 1,
    "sat_importance": "maxip",
    "sat_selection": "sampling",
    "sat_temperature": 0.05,
    "sat_selection_interval": 1,
    "sat_gqa": "group",
    "sat_channel_multiple": None,
    "sat_omitted_neurons": "optimizer",
}
"""Flags of --method sat and their defaults; start: half of the steps, at least 1; multiple: 128 on a GPU, else 1."""
SPDF_ONLY: dict[str, Any] = {"spdf_rate": SPDF_RATE, "spdf_until": None}
SPIEL_ONLY: dict[str, Any] = {
    "spiel_rank": LORA_RANKS[0],
    "spiel_interval": spiel.INTERVAL,
    "spiel_accumulate": spiel.ACCUMULATE,
    "spiel_replaced": spiel.REPLACED,
    "spiel_weight_decay": spiel.WEIGHT_DECAYS[-1],
}
FLAGS_OF = {"sat": SAT_ONLY, "spdf": SPDF_ONLY, "lora": {"lora_rank": LORA_RANKS[0]}, "spiel": SPIEL_ONLY}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model, ready for its method."""

    model: Any
    callbacks: list[TrainerCallback] = field(default_factory=list)
    optimizer: Optimizer | None = None
    """Where it may not be the Trainer's."""
    plain: Callable[[], Module] | None = None
    """Where the model is no plain one: makes it one, with what was learned in its weights."""


def build_model(args: argparse.Namespace, *, steps: int) -> Prepared:
    """The model of --model, ready for the method. Raises ValueError for what it cannot be combined with."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model, local_files_only=True, attn_implementation=args.attention, dtype=torch.float32
    )
    if args.method == "sat":
        sparse = sparsify(model, schedule=schedule(args, steps=steps), selection=selection(args))
        pack = args.deepspeed is None  # it reduces each micro-batch's gradient
        callback = SatCallback(sparse, pack=pack, omitted_neurons=args.sat_omitted_neurons)
        return Prepared(model=model, callbacks=[callback])
    if args.method == "spdf":
        weights = [module.weight for name, module in model.named_modules() if name.rpartition(".")[2] in LINEAR]
        until = max(1, steps // 2) if args.spdf_until is None else args.spdf_until
        return Prepared(model=model, callbacks=[StepsOf(Spdf(weights, rate=args.spdf_rate, until=until))])
    if args.method == "spiel":
        return _with_spiel(model, args, steps=steps)
    if args.method in ("lora", "ia3"):
        model = with_lora(model, rank=args.lora_rank) if args.method == "lora" else with_ia3(model)
        return Prepared(model=model, plain=lambda: merged(model))
    return Prepared(model=model)


def _with_spiel(model: Any, args: argparse.Namespace, *, steps: int) -> Prepared:
    if args.deepspeed is not None:
        raise ValueError(
            f"--method spiel cannot be combined with --deepspeed, got {args.deepspeed}: entries come and go with their "
            "moments, which ZeRO keeps in pieces of its own; leave it out, and DDP is used"
        )
    config = spiel.SpielConfig(
        rank=args.spiel_rank,
        interval=args.spiel_interval,
        accumulate=args.spiel_accumulate,
        replaced=args.spiel_replaced,
        steps=steps,
        seed=args.seed,
    )
    replicas = dist.group.WORLD if dist.is_initialized() else None
    trained = spiel.Spiel(model, names=LINEAR, config=config, group=replicas)
    optimizer = trained.optimizer(lr=args.lr, weight_decay=args.spiel_weight_decay)
    return Prepared(model=model, callbacks=[StepsOf(trained)], optimizer=optimizer, plain=trained.merge)


class MadeWith(TrainerCallback, ExportableState):
    """Says in each checkpoint by which method it was made, and with what else the steps to come depend on.

    learnt: the examples, in their files' order.
    """

    def __init__(self, args: argparse.Namespace, *, steps: int, learnt: Sequence[Mapping[str, Tensor]]) -> None:
        names = ("method", *FLAGS_OF.get(args.method, {}), "lr", "seed", "global_batch_size")
        self.made_with = {f"--{name.replace('_', '-')}": str(getattr(args, name)) for name in names}
        self.made_with["--train-iters (or what --epochs comes to)"] = str(steps)
        self.made_with["--data (by --template and --max-tokens)"] = _digest(learnt)

    def refuse_other(self, checkpoint: Path) -> None:
        """Raises ValueError for a checkpoint that says something else."""
        file = checkpoint / TRAINER_STATE_NAME
        callbacks: Any = TrainerState.load_from_json(str(file)).stateful_callbacks if file.is_file() else {}
        saved = callbacks.get(type(self).__name__, self.state())["attributes"]
        for flag, value in self.made_with.items():
            if (made_with := saved.get(flag, value)) != value:  # older ones do not say all of it
                raise ValueError(
                    f"{flag} must be that of the checkpoint in --resume, {made_with}, got {value}; resume with the "
                    "same, or start a new run"
                )

    def state(self) -> dict[str, Any]:
        """What a checkpoint's trainer_state.json says of this run."""
        return {"args": {}, "attributes": self.made_with}


def _digest(examples: Sequence[Mapping[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for example in examples:
        for name in ("input_ids", "labels"):
            found.update(example[name].numpy().tobytes())
    return f"{len(examples):,} examples ({found.hexdigest()[:12]})"


class StepsOf(TrainerCallback):
    """Tells SPDF or SpIEL which step begins, and SpIEL that it ended."""

    def __init__(self, method: Spdf | spiel.Spiel) -> None:
        self.method = method

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.method.begin_step(state.global_step + 1)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if isinstance(self.method, spiel.Spiel):
            self.method.end_step()


# -- flags


def rate(text: str) -> Fraction:
    """For argparse: a share in [0, 1) as it is written, .96 or 24/25, exactly. Raises ArgumentTypeError."""
    found = _number(text)
    if not 0 <= found < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}; 0.5 leaves every second out, 0 none")
    return found


def share(text: str) -> Fraction:
    """The same, and 1 is one."""
    found = _number(text)
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {text}; 0.5 is a half, 1 is all")
    return found


def _number(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"must be a number such as 0.5 or 1/2, got {text!r}") from None


SAT_KINDS: dict[str, Any] = dict.fromkeys(SAT_ONLY, str) | {
    "sat_omission_rate": rate,
    "sat_temperature": float,
    **dict.fromkeys(("sat_schedule_start", "sat_rungs", "sat_selection_interval", "sat_channel_multiple"), int),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those that belong to one method; without a value they are None, until `settle`."""
    parser.add_argument("--lora-rank", type=int, help=f"the paper: {LORA_RANKS}")
    parser.add_argument("--spdf-rate", type=rate, help=f"share of each matrix that is zero; {SPDF_RATE}")
    parser.add_argument("--spdf-until", type=int, help="last step with zeros; half of the steps, at least 1")
    parser.add_argument("--spiel-rank", type=int, help="trains as many entries as LoRA of this rank parameters")
    parser.add_argument("--spiel-interval", type=int, help=f"steps from one replacement to the next; {spiel.INTERVAL}")
    parser.add_argument("--spiel-accumulate", type=int, help=f"steps that choose what comes; {spiel.ACCUMULATE}")
    parser.add_argument("--spiel-replaced", type=share, help=f"share replaced, falling to 0; {spiel.REPLACED}")
    parser.add_argument("--spiel-weight-decay", type=float, help=f"of the change; its authors {spiel.WEIGHT_DECAYS}")
    sat = parser.add_argument_group("SAT", "as in docs/flags.md")
    for name, kind in SAT_KINDS.items():
        sat.add_argument("--" + name.replace("_", "-"), type=kind)


def settle(args: argparse.Namespace, *, parser: argparse.ArgumentParser) -> None:
    """Flags of another method, or of no effect, are an error; those of this one get their defaults, and are checked."""
    if args.method == "sat" and args.sat_selection == "top-k" and args.sat_temperature is not None:
        parser.error(
            "--sat-temperature has no effect with --sat-selection top-k, which draws nothing, "
            f"got {args.sat_temperature}; leave it out"
        )
    for method, mine in FLAGS_OF.items():
        for name, default in mine.items():
            given = getattr(args, name)
            if given is None and args.method == method:
                setattr(args, name, default)
            elif given is not None and args.method != method:
                flag = "--" + name.replace("_", "-")
                parser.error(f"{flag} has no effect with --method {args.method}, got {given}; leave it out")
    args.lr = LEARNING_RATES[args.method] if args.lr is None else args.lr
    if args.method == "sat":
        try:
            selection(args)
        except ValueError as error:
            parser.error(str(error))


def schedule(args: argparse.Namespace, *, steps: int) -> Schedule:
    """The ladder over ``steps`` steps."""
    start = max(1, steps // 2) if args.sat_schedule_start is None else args.sat_schedule_start
    return build_schedule(
        ScheduleConfig(
            kind="ladder",
            omission_rate=args.sat_omission_rate,
            start=start,
            rungs=args.sat_rungs,
            train_iters=steps,
        )
    )


def selection(args: argparse.Namespace) -> SelectionConfig:
    """How neurons are chosen."""
    multiple = args.sat_channel_multiple
    return SelectionConfig(
        importance=args.sat_importance,
        selection=args.sat_selection,
        temperature=args.sat_temperature,
        selection_interval=args.sat_selection_interval,
        gqa=args.sat_gqa,
        channel_multiple=multiple if multiple is not None else 128 if torch.cuda.is_available() else 1,
        seed=args.seed,
    )
