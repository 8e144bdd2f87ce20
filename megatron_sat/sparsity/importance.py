"""How much a neuron matters (eq. 5): the paper's four metrics, signed as printed, and one of our own.

A metric is a score of weight rows given sums over the module's tokens. They are gathered as plain sums, so that ranks
which hold other tokens (DP, CP, SP) can be added before anything is divided or rooted. Everything here is fp32,
whatever the weights are stored in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Needs = Literal["nothing", "inputs", "activations"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric sums over tokens and how it turns that into scores."""

    needs: Needs
    """What it looks at: nothing, the module's input [.., h], or the neurons' activations [.., k]."""
    sums: Callable[[Tensor], Tensor]
    """[.., w] tokens -> [w + 1] fp32: a sum over tokens a column, then the number of tokens."""
    score: Callable[[Tensor, Tensor], Tensor]
    """(weight, sums) -> one score a neuron. The weight is [k, h] (rows of fc1/qkv), for activations [h, k] (fc2/proj)."""


def no_sums(tokens: Tensor) -> Tensor:
    """[.., w] -> [1]: the number of tokens alone, for metrics that look at weights only."""
    return torch.full((1,), float(tokens[..., 0].numel()), device=tokens.device)


def token_sums(tokens: Tensor) -> Tensor:
    """[.., w] -> [w + 1]: the sum over all tokens of each column, and how many tokens there were."""
    flat = tokens.reshape(-1, tokens.size(-1))
    return torch.cat([flat.sum(0, dtype=torch.float32), no_sums(tokens)])


def token_square_sums(tokens: Tensor) -> Tensor:
    """[.., w] -> [w + 1]: the sum over all tokens of each column's squares, and how many tokens there were."""
    flat = tokens.reshape(-1, tokens.size(-1))
    return torch.cat([flat.float().square().sum(0), no_sums(tokens)])


def uniform(weight: Tensor, sums: Tensor) -> Tensor:
    """s_v = 1."""
    return torch.ones(weight.size(0), dtype=torch.float32, device=weight.device)


def magnitude(weight: Tensor, sums: Tensor) -> Tensor:
    """s_v = ‖v‖₂."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def wanda(weight: Tensor, sums: Tensor) -> Tensor:
    """s_v = [‖Z¹‖₂ … ‖Z^d‖₂] · v, with v's signs (the pruning paper of that name takes |v|)."""
    return torch.mv(weight.float(), sums[:-1].sqrt())


def maxip(weight: Tensor, sums: Tensor) -> Tensor:
    """s_v = (Σ_i Z_i / m) · v."""
    return torch.mv(weight.float(), sums[:-1] / sums[-1])


def contribution(weight: Tensor, sums: Tensor) -> Tensor:
    """Ours: rms over tokens of the neuron's activation × ‖its output column‖₂, what leaving it out would change."""
    rms = (sums[:-1] / sums[-1]).sqrt()
    return rms * torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)


METRICS: dict[str, Metric] = {
    "uniform": Metric(needs="nothing", sums=no_sums, score=uniform),
    "magnitude": Metric(needs="nothing", sums=no_sums, score=magnitude),
    "wanda": Metric(needs="inputs", sums=token_square_sums, score=wanda),
    "maxip": Metric(needs="inputs", sums=token_sums, score=maxip),
    "contribution": Metric(needs="activations", sums=token_square_sums, score=contribution),
}
"""By the name that ``--sat-importance`` takes."""
