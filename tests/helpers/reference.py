"""Slow, obvious twins of the fast paths: loops over Python numbers, read off the equations one by one."""

import math
from fractions import Fraction
from itertools import combinations, permutations
from typing import NamedTuple

import torch
from torch import Tensor


def literal_scores(metric: str, weight: Tensor, tokens: Tensor) -> list[float]:
    """Eq. 5, a score for each row v of ``weight`` [k, h] given the tokens Z [m, h]."""
    z: list[list[float]] = tokens.double().tolist()
    m, h = len(z), len(z[0])

    def score(v: list[float]) -> float:
        if metric == "uniform":
            return 1.0
        if metric == "magnitude":
            return math.sqrt(sum(v[j] ** 2 for j in range(h)))
        if metric == "wanda":
            return sum(math.sqrt(sum(z[i][j] ** 2 for i in range(m))) * v[j] for j in range(h))
        assert metric == "maxip"
        return sum(sum(z[i][j] for i in range(m)) / m * v[j] for j in range(h))

    return [score(v) for v in weight.double().tolist()]


def literal_contribution(weight: Tensor, activations: Tensor) -> list[float]:
    """rms over the m tokens of each column of [m, k], times the norm of that column of ``weight`` [h, k]."""
    a, w = activations.double().tolist(), weight.double().tolist()
    scores = []
    for k in range(len(w[0])):
        rms = math.sqrt(sum(row[k] ** 2 for row in a) / len(a))
        scores.append(rms * math.sqrt(sum(row[k] ** 2 for row in w)))
    return scores


class QkvRow(NamedTuple):
    """What a row of a fused qkv weight belongs to."""

    group: int
    part: str
    """q, k or v."""
    head: int
    """Within the group; -1 for k and v, which belong to all its heads."""
    dim: int


def label_qkv(*, groups: int, heads_per_group: int, head_dim: int) -> list[QkvRow]:
    """Every row of Megatron's fused qkv: by group its heads, its key, its value; of each, head_dim rows."""
    return [
        QkvRow(group, part, head, dim)
        for group in range(groups)
        for part, heads in (("q", range(heads_per_group)), ("k", [-1]), ("v", [-1]))
        for head in heads
        for dim in range(head_dim)
    ]


def mean(values: list[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def literal_head_scores(
    per_row: list[float], labels: list[QkvRow], *, whole_groups: bool
) -> dict[tuple[int, int], float]:
    """Eq. 6 and 7 by label: {(group, head): score}; head is -1 where a group is scored as a whole."""

    def part(group: int, name: str, head: int) -> float:
        rows = zip(per_row, labels, strict=True)
        return mean([s for s, row in rows if (row.group, row.part, row.head) == (group, name, head)])

    def score(group: int, query: float) -> float:
        return (query + part(group, "k", -1) + part(group, "v", -1)) / 3

    scores = {}
    for group in sorted({row.group for row in labels}):
        heads = sorted({row.head for row in labels if row.part == "q"})
        queries = [part(group, "q", head) for head in heads]
        if whole_groups:
            scores[group, -1] = score(group, mean(queries))
        else:
            scores |= {(group, head): score(group, q) for head, q in zip(heads, queries, strict=True)}
    return scores


def literal_keep_count(total: int, rate: Fraction, *, multiple: int = 1) -> int:
    """The most units, in multiples, that do not exceed total (1 - rate); one multiple if none does."""
    if rate == 0:
        return total
    allowed = [count for count in range(multiple, total + 1, multiple) if count <= total * (1 - rate)]
    return max(allowed, default=multiple)


def literal_select(keys: list[float], *, groups: int, keep: int) -> list[int]:
    """In each of ``groups`` equal runs the ``keep`` largest keys, the lower place first among equals."""
    size, chosen = len(keys) // groups, []
    for start in range(0, len(keys), size):
        run = sorted(range(start, start + size), key=lambda place: (-keys[place], place))
        chosen += sorted(run[:keep])
    return chosen


def subset_probabilities(
    scores: list[float], *, keep: int, temperature: float
) -> dict[tuple[int, ...], float]:
    """How likely each set of ``keep`` is, drawn one by one from the softmax of those still there (eq. 8)."""
    weights = [math.exp(score / temperature) for score in scores]

    def in_this_order(order: tuple[int, ...]) -> float:
        left, probability = sum(weights), 1.0
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        return probability

    subsets = combinations(range(len(scores)), keep)
    return {subset: sum(map(in_this_order, permutations(subset))) for subset in subsets}


def zeroed(weight: Tensor, kept: Tensor, *, dim: int) -> Tensor:
    """The dense twin of a cut weight: as large, with zeros wherever ``kept`` does not point along ``dim``."""
    mask = torch.zeros(weight.size(dim), dtype=weight.dtype, device=weight.device)
    for place in kept.tolist():
        mask[place] = 1
    return weight * (mask[:, None] if dim == 0 and weight.dim() > 1 else mask)
