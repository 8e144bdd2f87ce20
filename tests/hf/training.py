"""transformers' Trainer on tiny models, and the loop it stands for, written out."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from megatron_sat.hf.callback import SatCallback
from megatron_sat.hf.model import SparseModel
from tests.hf.models import VOCAB, chosen

LEARNING_RATE = 1e-2


def make_texts(count: int, *, seed: int = 0, length: int = 8) -> list[dict[str, Tensor]]:
    """Samples of Trainer's kind; half of the labels are left out, so that micro-batches weigh differently."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for number in range(count):
        tokens = torch.randint(0, VOCAB, (length,), generator=generator)
        labels = tokens.masked_fill(torch.arange(length) < number % (length - 2), -100)
        texts.append({"input_ids": tokens, "labels": labels})
    return texts


def as_a_rank(*, knows_gloo: bool = True) -> None:
    """In a forked rank: forget what accelerate knew of the parent, which was one process.

    knows_gloo: with DeepSpeed accelerate knows of other processes on GPUs alone; here it takes gloo for them.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    if knows_gloo:
        backend = PartialState._prepare_backend

        def prepare(self: PartialState, cpu: bool = False, *more: Any, **named: Any) -> Any:
            return backend(self, cpu, *more, **named) if cpu else ("gloo", DistributedType.NO)

        PartialState._prepare_backend = prepare  # type: ignore[method-assign]


class Batches:
    """A collator that remembers what it gave."""

    def __init__(self) -> None:
        self.given: list[dict[str, Tensor]] = []

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        self.given.append(batch)
        return {name: tensor.clone() for name, tensor in batch.items()}


class Choices(TrainerCallback):
    """What was kept in each step, as its update saw it."""

    def __init__(self, sparse: SparseModel) -> None:
        self.sparse, self.seen = sparse, list[dict[str, list[int]]]()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append({name: index.tolist() for name, index in chosen(self.sparse).items()})


def make_arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Six steps of two micro-batches; nothing is asked of a network, and nothing is random but the order."""
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(settings | changes))


def make_trainer(
    model: PreTrainedModel,
    folder: Path,
    *callbacks: TrainerCallback,
    texts: list[dict[str, Tensor]] | None = None,
    collator: Any = None,
    evaluated: list[dict[str, Tensor]] | None = None,
    **changes: Any,
) -> Trainer:
    return Trainer(
        model,
        make_arguments(folder, **changes),
        train_dataset=texts or make_texts(64),  # type: ignore[arg-type]
        eval_dataset=evaluated,  # type: ignore[arg-type]
        data_collator=collator or Batches(),
        callbacks=list(callbacks),
    )


def train(
    model: PreTrainedModel,
    sparse: SparseModel,
    folder: Path,
    *,
    pack: bool = True,
    omitted_neurons: str = "optimizer",
    resume: str | None = None,
    **more: Any,
) -> tuple[Trainer, list[dict[str, list[int]]]]:
    """A whole run with the callback; the Trainer, and the choices of its steps."""
    choices = Choices(sparse)
    callback = SatCallback(sparse, pack=pack, omitted_neurons=omitted_neurons)
    trainer = make_trainer(model, folder, callback, choices, **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, choices.seen


def logged(trainer: Trainer, name: str) -> list[float]:
    """That figure of every line of the log that has it."""
    return [line[name] for line in trainer.state.log_history if name in line]


def written_out(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    sparse: SparseModel | None,
    *,
    accumulate: int = 2,
    frozen: bool = False,
) -> Iterator[float]:
    """Trainer's loop: AdamW, clipping to 1, a step's loss the mean over its tokens. Yields the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    if frozen and sparse is not None:
        sparse.freeze_omitted(optimizer)
    for step, first in enumerate(range(0, len(batches), accumulate), start=1):
        mine = batches[first : first + accumulate]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in mine)
        total = 0.0
        with nullcontext() if sparse is None else sparse.step(step):
            for batch in mine:
                loss = summed_loss(model.train(), batch) / tokens
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        yield total


def summed_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Over the batch's labels, each predicted from the tokens before it."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")
