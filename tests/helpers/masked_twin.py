"""Training with masks as its definition reads: w * m in the forward, so that the chain rule masks the gradient, in one
process, by torch's own AdamW. What `baselines.masks` does inside Megatron is compared with it."""

from collections.abc import Callable

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.func import functional_call

from tests.helpers.plain_gpt import make_batches

LEARNING_RATE = 5e-4
RATE: dict[str, object] = {"lr": LEARNING_RATE, "min_lr": LEARNING_RATE, "lr_decay_style": "constant"}
RATE |= {"lr_warmup_iters": 0, "lr_warmup_init": 0.0}
"""For `plain_engine.make_engine`: what `Twin` uses."""
CLIP, DECAY, BETAS = 1.0, 0.1, (0.9, 0.95)
QUERY_HEADS, HEAD = 2, 8
"""Of a query group of the plain GPT, and a head's size."""


def split(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A parameter of a whole layer as the matrices in it, by another way than `baselines.matrices`: views."""
    if "linear_qkv" in name:
        groups = weight.view(-1, QUERY_HEADS + 2, HEAD, weight.shape[1])
        return {"q": groups[:, :QUERY_HEADS], "k": groups[:, QUERY_HEADS : QUERY_HEADS + 1], "v": groups[:, -1:]}
    if "linear_fc1" in name:
        return dict(zip(("gate", "up"), weight.chunk(2), strict=True))
    if "linear_proj" in name or "linear_fc2" in name:
        return {"proj" if "linear_proj" in name else "down": weight}
    return {}


class Twin:
    """A model of one process, its masks by parameter name, and AdamW."""

    def __init__(self, model: GPTModel) -> None:
        self.model = model
        self.weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        self.masks = {name: torch.ones_like(w) for name, w in self.weights.items()}
        flat = [w for w in self.weights.values() if w.dim() == 1]
        wide = [w for w in self.weights.values() if w.dim() > 1]
        groups = [{"params": wide, "weight_decay": DECAY}, {"params": flat, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=1e-8)

    @property
    def matrices(self) -> dict[str, tuple[str, Tensor]]:
        """By "<layer>.<matrix>", from 1: the parameter's name, and the matrix' part of its mask: a view."""
        found = {}
        for name, mask in self.masks.items():
            for part, view in split(name, mask).items():
                found[f"{int(name.split('.')[2]) + 1}.{part}"] = name, view
        return found

    def apply_masks(self) -> None:
        """What is left out is zero from here on."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.mul_(self.masks[name])

    def gradients(self, step: int, *, total: int) -> tuple[float, dict[str, Tensor]]:
        """The loss over all unmasked tokens of a step, and its gradient by the masked weights (dense)."""
        used = {name: (w * self.masks[name]).detach().requires_grad_() for name, w in self.weights.items()}
        sums, tokens = torch.zeros(()), torch.zeros(())
        for batch in make_batches(step, total=total):
            arguments = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
            losses = functional_call(self.model, used, arguments, {"labels": batch["labels"]})
            sums = sums + (losses * batch["loss_mask"]).sum()
            tokens = tokens + batch["loss_mask"].sum()
        loss = sums / tokens
        return loss.item(), dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))

    def train_step(
        self, step: int, *, total: int, change: Callable[[dict[str, Tensor]], bool] = lambda _: True
    ) -> tuple[float, float]:
        """One update; returns loss and norm. change: sees the dense gradients, may change masks, and says whether the
        update is made."""
        loss, dense = self.gradients(step, total=total)
        updates = change(dense)
        for name, weight in self.weights.items():
            weight.grad = dense[name] * self.masks[name]
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), CLIP)
        if updates:
            self.adam.step()
        return loss, norm.item()
