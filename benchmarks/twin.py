"""The dense model once more in plain PyTorch, without Megatron: what a ratio over the dense program is worth.

SDPA, torch.compile for each block and for the head with its loss, torch's fused AdamW over fp32 main copies of bf16
weights, gradients added up in fp32 over micro-batches (or in bf16, which autograd does by itself), clipping. It is the
program's dense model number for number (tests/benchmarks/test_twin.py), so a faster twin is a slower program.

Shapes: `b` micro-batch, `s` sequence, `h` hidden, `n` heads, `g` query groups, `d` head dim, `f` channels, `v` rows of
the vocabulary. Batch first, as PyTorch's own attention has it.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sat.model.flops import ModelShape

EPSILON, BASE = 1e-5, 10_000.0
"""Of RMSNorm, and of the rotary frequencies: Llama 2's, and the program's defaults."""


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.kv_channels
        n, g = shape.num_attention_heads, shape.num_query_groups
        self.sizes, self.head_dim = (n * d, g * d, g * d), d
        self.attention_norm, self.mlp_norm = nn.RMSNorm(h, eps=EPSILON), nn.RMSNorm(h, eps=EPSILON)
        self.qkv = nn.Linear(h, sum(self.sizes), bias=False)
        self.out = nn.Linear(n * d, h, bias=False)
        self.gate_up = nn.Linear(h, 2 * f, bias=False)
        self.down = nn.Linear(f, h, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x: [b, s, h]; cosine, sine: [s, d]. Returns [b, s, h]."""
        parts = self.qkv(self.attention_norm(x)).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)  # [b, n or g, s, d]
        q, k = _rotated(q, cosine, sine), _rotated(k, cosine, sine)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def _rotated(t: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return t * cosine + torch.cat((-second, first), dim=-1) * sine


def rotary_tables(shape: ModelShape, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[s, d] cosines and sines of every position's angles."""
    d = shape.kv_channels
    frequencies = BASE ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    angles = torch.outer(torch.arange(shape.seq_length, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Head(nn.Module):
    """Last norm, logits, and the sum of the tokens' losses."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden_size, eps=EPSILON)
        self.logits = nn.Linear(shape.hidden_size, shape.padded_vocab_size, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x: [b, s, h]; labels: [b, s]. Returns a number, fp32."""
        logits = self.logits(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits.float(), labels.flatten(), reduction="sum")


class PlainModel(nn.Module):
    """Embedding, blocks and head; blocks and head are compiled where torch compiles."""

    def __init__(self, shape: ModelShape, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        with device:
            self.embedding = nn.Embedding(shape.padded_vocab_size, shape.hidden_size)
            self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
            self.head = Head(shape)
        self.to(dtype)
        self.tables = tuple(table.to(device) for table in rotary_tables(shape, dtype=dtype))
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.02)
        for module in (*self.blocks, self.head):
            module.compile()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels: [b, s]. Returns the sum of the tokens' losses."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, *self.tables)
        loss: Tensor = self.head(x, labels)
        return loss


def add_up_in_fp32(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Let every backward add its gradients to fp32 sums, which are returned, and leave nothing in ``grad``."""
    sums = []
    for parameter in parameters:
        total = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.register_post_accumulate_grad_hook(partial(_add_to, total))
        sums.append(total)
    return sums


def _add_to(total: Tensor, parameter: Tensor) -> None:
    assert parameter.grad is not None
    total.add_(parameter.grad)
    parameter.grad = None


class PlainTraining:
    """Steps of a `PlainModel`: micro-batches, clipping, AdamW on fp32 copies."""

    def __init__(
        self,
        model: PlainModel,
        *,
        sums: torch.dtype,
        lr: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
        clip: float,
    ) -> None:
        """sums: gradients of micro-batches are added up in it: float32, or the model's own."""
        self.model, self.clip = model, clip
        self._parameters: list[Tensor] = list(model.parameters())
        self._sums = add_up_in_fp32(model.parameters()) if sums == torch.float32 else None
        self._main = [p if p.dtype == torch.float32 else p.detach().float() for p in self._parameters]
        groups = [  # norms have no decay, in the program either
            {"params": [p for p in self._main if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in self._main if p.dim() == 1], "weight_decay": 0.0},
        ]
        on_gpu = self._parameters[0].is_cuda
        self._optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=epsilon, fused=on_gpu)

    def step(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """One update. batches: "tokens" and "labels" [b, s] each. Returns the mean loss of their tokens, before it."""
        total, tokens = torch.zeros((), device=self._main[0].device), 0
        for batch in batches:
            loss = self.model(batch["tokens"], batch["labels"])
            loss.backward()
            total += loss.detach()
            tokens += batch["labels"].numel()
        self._take_gradients(tokens)
        torch.nn.utils.clip_grad_norm_(self._main, self.clip)
        self._optimizer.step()
        self._give_weights_back()
        return total.item() / tokens

    def _take_gradients(self, tokens: int) -> None:
        """Means over the tokens, in fp32, where AdamW looks for them."""
        for number, (main, parameter) in enumerate(zip(self._main, self._parameters, strict=True)):
            if self._sums is not None:
                main.grad = self._sums[number]
            else:
                assert parameter.grad is not None
                main.grad = parameter.grad.float()
        gradients = [main.grad for main in self._main if main.grad is not None]
        torch._foreach_div_(gradients, float(tokens))

    def _give_weights_back(self) -> None:
        with torch.no_grad():
            if self._main[0] is not self._parameters[0]:
                torch._foreach_copy_(self._parameters, self._main)
            for main, parameter in zip(self._main, self._parameters, strict=True):
                main.grad = parameter.grad = None
            if self._sums is not None:
                torch._foreach_zero_(self._sums)


def plain_training(
    shape: ModelShape, settings: Mapping[str, Any], *, sums: torch.dtype, device: torch.device
) -> PlainTraining:
    """The twin of a run. settings: resolved, by the program's keys."""
    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    return PlainTraining(
        PlainModel(shape, dtype=dtype, device=device),
        sums=sums,
        lr=settings["lr"],
        betas=(settings["adam_beta1"], settings["adam_beta2"]),
        epsilon=settings["adam_eps"],
        weight_decay=settings["weight_decay"],
        clip=settings["clip_grad"],
    )


def plain_layer(shape: ModelShape, *, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """One block alone, whose weights' gradients are added up in fp32. [b, s, h] -> [b, s, h]."""
    with device:
        block = Block(shape).to(dtype)
    add_up_in_fp32(block.parameters())
    tables = [table.to(device) for table in rotary_tables(shape, dtype=dtype)]
    block.compile()
    return lambda x: block(x, *tables)
