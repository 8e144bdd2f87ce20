"""Mixed growing, MST's change of topology, of whole units: a share of the kept ones is replaced, by importance.

MST (masks) drops the smallest of the weights that take part, and lets others grow: three quarters of them by their
gradient, one quarter at random. Here a unit is a head or channel, and one score, its importance, serves both; units
that were just dropped come last among those that grow, so that what is replaced really goes. How many are replaced
falls with a cosine over the run. Shapes: `units` of this rank's shard, in equal selection groups.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sat.sparsity.neurons import Kept


@dataclass(frozen=True, kw_only=True)
class Growing:
    """How much changes at a time. The settings are those of ``--mst-*``."""

    replaced: float
    """ζ, share of the kept units that the first change replaces, in [0, 1)."""
    random_share: float
    """Share of the grown ones that are random, in [0, 1]."""
    last_step: int
    """T, where the share reaches 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.replaced < 1:
            raise ValueError(f"--mst-replaced must be in [0, 1), got {self.replaced}; MST uses 0.3")
        if not 0 <= self.random_share <= 1:
            raise ValueError(f"--mst-random-share must be in [0, 1], got {self.random_share}; MST uses 0.25")


@dataclass(frozen=True, kw_only=True)
class Change:
    """How many entries of a group of n leave and come at one change."""

    stay: int
    by_score: int
    """Grown by score."""
    at_random: int


def replaced_share(step: int, *, replaced: float, last_step: int) -> float:
    """ζ/2 (1 + cos(π t / T)), with t steps done."""
    return replaced / 2 * (1 + math.cos(math.pi * step / last_step))


def change_of(taking_part: int, *, wanted: int, share: float, random_share: float) -> Change:
    """From so many entries to ``wanted``: MST's n_prune = max(⌊n₁ f⌋, n₁ - wanted), n_grow what is then missing."""
    pruned = max(int(taking_part * share), taking_part - wanted)
    grown = wanted - (taking_part - pruned)
    by_score = int(grown * (1 - random_share))
    return Change(stay=taking_part - pruned, by_score=by_score, at_random=grown - by_score)


def regrow(
    scores: Tensor, *, before: Kept | None, groups: int, keep: int, growing: Growing, step: int, noise: Tensor
) -> Tensor:
    """The choice that follows ``before`` (None: everything took part), ``keep`` of each group.

    scores: [units] fp32. noise: [units], whose order is random. step: the first one of the new choice, from 1.
    Returns [groups * keep] int64, ascending. Equal scores go to the lower index.
    """
    scores, noise = scores.view(groups, -1), noise.view(groups, -1)
    kept = torch.ones_like(scores, dtype=torch.bool)
    if before is not None:
        kept = torch.zeros_like(kept).view(-1).index_fill(0, before.index, True).view_as(kept)
    taking_part = scores.size(1) if before is None else before.count // groups
    share = replaced_share(step - 1, replaced=growing.replaced, last_step=growing.last_step)
    change = change_of(taking_part, wanted=keep, share=share, random_share=growing.random_share)
    chosen = torch.zeros_like(kept)
    chosen = _with_best(chosen, scores, first=kept, count=change.stay)
    chosen = _with_best(chosen, scores, first=~kept, count=change.by_score)
    chosen = _with_best(chosen, noise, first=~kept, count=change.at_random)
    inside = (~chosen).to(torch.int8).argsort(dim=1, stable=True)[:, :keep]  # how many there are is known
    offsets = torch.arange(groups, device=scores.device)[:, None] * scores.size(1)
    return (inside + offsets).flatten()


def _with_best(chosen: Tensor, scores: Tensor, *, first: Tensor, count: int) -> Tensor:
    """``chosen`` and the ``count`` best of each row that are not in it: those of ``first``, then the others."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.where(chosen, 2, torch.where(first, 0, 1)).gather(1, order)
    best = order.gather(1, rank.argsort(dim=1, stable=True))[:, :count]
    return chosen.scatter(1, best, True)
