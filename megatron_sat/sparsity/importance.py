"""How much a neuron matters (eq. 5): the paper's four metrics, signed as printed, and one of our own.

A metric is a score of weight rows given sums over the module's tokens. They are gathered as plain sums, so
that ranks which hold other tokens (DP, CP, SP) can be added before anything is divided or rooted. Everything
here is fp32, whatever weights and tokens are stored in, without an fp32 copy of a whole weight or all tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Needs = Literal["nothing", "inputs", "activations"]

ROWS_AT_ONCE = 4096
"""Rows of a weight that are fp32 at a time: a whole fc1 of 7B would be 360 MB more at the peak."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric sums over tokens and how it turns that into scores."""

    needs: Needs
    """What it looks at: nothing, the module's input [.., h], or the neurons' activations [.., k]."""
    sums: Callable[[Tensor], Tensor]
    """[.., w] tokens -> [w + 1] fp32: a sum over tokens a column, then the number of tokens."""
    score: Callable[[Tensor, Tensor], Tensor]
    """(weight, sums) -> [k] fp32, a score for each of the weight's k neurons.

    The weight is [k, h], the rows of fc1 or qkv; for activations [h, k], the columns of fc2 or proj.
    """
    reads_weight: bool = True
    """Whether it looks at the weight's values, and not only at its shape."""


def no_sums(tokens: Tensor) -> Tensor:
    """[.., w] -> [1]: the number of tokens alone, for metrics that look at weights only."""
    return torch.full((1,), tokens[..., 0].numel(), dtype=torch.float32, device=tokens.device)


def token_sums(tokens: Tensor) -> Tensor:
    """[.., w] -> [w + 1]: the sum over all tokens of each column, and how many tokens there were."""
    flat = tokens.reshape(-1, tokens.size(-1))
    return torch.cat([flat.sum(0, dtype=torch.float32), no_sums(tokens)])


def token_square_sums(tokens: Tensor) -> Tensor:
    """[.., w] -> [w + 1]: each column's sum of squares over all tokens, and how many tokens there were."""
    flat = tokens.reshape(-1, tokens.size(-1))
    # a norm, not square().sum(): it reads 16-bit tokens as they are
    return torch.cat([torch.linalg.vector_norm(flat, dim=0, dtype=torch.float32).square(), no_sums(tokens)])


def uniform(weight: Tensor, sums: Tensor) -> Tensor:
    """s_v = 1."""
    return torch.ones(weight.size(0), dtype=torch.float32, device=weight.device)


def magnitude(weight: Tensor, sums: Tensor) -> Tensor:
    """s_v = ‖v‖₂."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def wanda(weight: Tensor, sums: Tensor) -> Tensor:
    """s_v = [‖Z¹‖₂ … ‖Z^d‖₂] · v, with v's signs (the pruning paper of that name takes |v|)."""
    return _inner(weight, sums[:-1].sqrt())


def maxip(weight: Tensor, sums: Tensor) -> Tensor:
    """s_v = (Σ_i Z_i / m) · v."""
    return _inner(weight, sums[:-1] / sums[-1])


def contribution(weight: Tensor, sums: Tensor) -> Tensor:
    """Ours: rms over tokens of the neuron's activation × ‖its output column‖₂: what it adds to the output."""
    rms = (sums[:-1] / sums[-1]).sqrt()
    return rms * torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)


def _inner(weight: Tensor, vector: Tensor) -> Tensor:
    """[k] fp32: the inner product of each row of [k, h] with [h], products and sums in fp32."""
    if weight.is_cuda:
        scores: Tensor = _compiled()(weight, vector)
        return scores
    return torch.cat([torch.mv(rows.float(), vector) for rows in weight.split(ROWS_AT_ONCE)])


def _widened(weight: Tensor, vector: Tensor) -> Tensor:
    return (weight.float() * vector).sum(1)


@cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    """One kernel that reads a weight once, as it is stored."""
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(_widened)
    return compiled


METRICS: dict[str, Metric] = {
    "uniform": Metric(needs="nothing", sums=no_sums, score=uniform, reads_weight=False),
    "magnitude": Metric(needs="nothing", sums=no_sums, score=magnitude),
    "wanda": Metric(needs="inputs", sums=token_square_sums, score=wanda),
    "maxip": Metric(needs="inputs", sums=token_sums, score=maxip),
    "contribution": Metric(needs="activations", sums=token_square_sums, score=contribution),
}
"""By the name that ``--sat-importance`` takes."""
