"""How often the right response to a prompt is likelier than others: multiple choice out of instruction records."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from examples.sft_hf import NOT_LEARNT, Example, collate

COUNT = 4
"""Responses to choose from: chance is a quarter."""


def choice_accuracy(trainer: Trainer, asked: list[list[Example]], *, batch: int) -> float:
    """The share of what is ``asked`` (`candidates`) whose own response has the fewest nats a token; ties are right.

    The Trainer's model, in evaluation mode, in one process.
    """
    flat = [each for group in asked for each in group]
    order = sorted(range(len(flat)), key=lambda number: len(flat[number]["input_ids"]))  # little filling
    nats = torch.empty(len(flat))
    for part in torch.tensor(order).split(batch):
        nats[part] = nats_a_token(trainer, [flat[number] for number in part.tolist()])
    groups = nats.view(len(asked), COUNT)
    return (groups[:, 0] <= groups.amin(1)).float().mean().item()


def candidates(examples: list[Example]) -> list[list[Example]]:
    """For each example itself and its prompt with the responses of the three examples whose prompts are most alike.

    Alike are neighbours in the order of prompts by tokens, so those of one kind of task stand together. Examples with
    more than one response (conversations) are left out. Raises ValueError where less than `COUNT` are left.
    """
    single = []
    for example in examples:
        learnt = (example["labels"] != NOT_LEARNT).nonzero().flatten()
        begin, end = int(learnt[0]), int(learnt[-1]) + 1
        if len(learnt) == end - begin:
            single.append((example["input_ids"][:begin], example["input_ids"][begin:end]))
    if len(single) < COUNT:
        raise ValueError(
            f"--held-out must hold {COUNT} records of one response to choose from, it holds {len(single)}; hold more"
        )
    single.sort(key=lambda pair: pair[0].tolist())
    found = []
    for place, (prompt, right) in enumerate(single):
        first = min(max(place - COUNT // 2, 0), len(single) - COUNT)
        others = [single[number][1] for number in range(first, first + COUNT) if number != place]
        found.append([joined(prompt, response) for response in (right, *others)])
    return found


def joined(prompt: Tensor, response: Tensor) -> Example:
    """A prompt [p] with a response [r] of another, as an example of which the response is learnt."""
    return {
        "input_ids": torch.cat([prompt, response]),
        "labels": torch.cat([torch.full_like(prompt, NOT_LEARNT), response]),
    }


@torch.no_grad()
def nats_a_token(trainer: Trainer, examples: list[Example]) -> Tensor:
    """[b] fp32 on the CPU: of each example the mean loss of what is learnt."""
    model = trainer.model_wrapped.eval()
    inputs = {name: tensor.to(trainer.args.device) for name, tensor in collate(examples, fill=0).items()}
    labels = inputs.pop("labels")[:, 1:]
    with trainer.compute_loss_context_manager():
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    lost = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
    return (lost.sum(1) / (labels != NOT_LEARNT).sum(1)).cpu()
