"""What a neuron is, and where its weights lie in Megatron's fused matrices.

A unit is what leaves together: a channel of the MLP (`Channels`), a query group or a head of the attention
(`Heads`). Both speak of one TP rank's shard; `Kept` names the units of that shard that take part in a step.
Which units are kept is decided in `selection`; how a weight is cut, in `gather`.

Shapes: fc1 [2 f/p, h] as gate | up (plain: [f/p, h]), fc2 [h, f/p]; qkv [g/p * (n/g + 2) * d, h], a query
group's heads, then its key, then its value; proj [h, n/p * d].
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The units of one rank's shard that take part in a step."""

    index: Tensor
    """[k] int64, ascending, without repetition, in [0, units)."""
    units: int
    """How many units the shard has."""

    @property
    def count(self) -> int:
        return self.index.numel()

    @property
    def keep_rate(self) -> Fraction:
        """Kept over all, exactly."""
        return Fraction(self.count, self.units)

    def omitted(self) -> Tensor:
        """[units - k] int64, ascending: the units that sit this step out."""
        takes_part = torch.zeros(self.units, dtype=torch.int8, device=self.index.device)
        takes_part.index_fill_(0, self.index, 1)
        # a stable sort, not nonzero(): how many there are is known, so a GPU need not be waited for
        return takes_part.argsort(stable=True)[: self.units - self.count]


class Neurons(Protocol):
    """How the units of a module lie in its column-parallel and its row-parallel weight."""

    @property
    def units(self) -> int:
        """Units in this rank's shard."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the column-parallel weight (fc1, qkv) that belong to the units ``index`` alone.

        index: [k] int64, ascending. Returns int64, ascending.
        """
        ...

    def kept_rows(self, index: Tensor) -> Tensor:
        """Rows that a step with only the units ``index`` needs: `rows`, and what all share. Ascending."""
        ...

    def columns(self, index: Tensor) -> Tensor:
        """Columns of the row-parallel weight (fc2, proj) that belong to ``index``. int64, ascending."""
        ...

    def scored_rows(self, weight: Tensor) -> Tensor:
        """The part of the column-parallel weight whose rows are scored: a view of it, maybe all."""
        ...

    def scores_of_rows(self, per_row: Tensor) -> Tensor:
        """[units] from one score for each of the `scored_rows`."""
        ...

    def scores_of_columns(self, per_column: Tensor) -> Tensor:
        """[units] from one score for each column of the row-parallel weight."""
        ...


@dataclass(frozen=True, kw_only=True)
class Channels:
    """MLP channels; with a gate, channel i is row i of gate, row i of up and column i of down."""

    units: int
    """f/p."""
    gated: bool
    """Whether fc1 is gate | up (SwiGLU) or one matrix."""
    score_source: str = "gate"
    """Rows of a gated fc1 that score a channel: gate (σ sits there, eq. 4), up, gate+up (their mean)."""

    def rows(self, index: Tensor) -> Tensor:
        return torch.cat([index, index + self.units]) if self.gated else index

    def kept_rows(self, index: Tensor) -> Tensor:
        return self.rows(index)

    def columns(self, index: Tensor) -> Tensor:
        return index

    def scored_rows(self, weight: Tensor) -> Tensor:
        if not self.gated or self.score_source == "gate+up":
            return weight
        return weight[: self.units] if self.score_source == "gate" else weight[self.units :]

    def scores_of_rows(self, per_row: Tensor) -> Tensor:
        return per_row.view(-1, self.units).mean(0)

    def scores_of_columns(self, per_column: Tensor) -> Tensor:
        return per_column


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention heads: they leave as whole query groups (Q, K, V, O) or singly in each group (Q, O)."""

    groups: int
    """g/p, query groups in the shard."""
    heads_per_group: int
    """n/g."""
    head_dim: int
    """d."""
    whole_groups: bool
    """True: a unit is a query group. False: a unit is a head, and every group keeps as many."""

    def __post_init__(self) -> None:
        if not self.whole_groups and self.heads_per_group == 1:
            raise ValueError(
                "--sat-gqa head needs several heads in a query group, got 1: no head could leave; "
                "use --sat-gqa group, where a group of one head leaves with its key and value"
            )

    @property
    def units(self) -> int:
        return self.groups if self.whole_groups else self.groups * self.heads_per_group

    def rows(self, index: Tensor) -> Tensor:
        if self.whole_groups:
            return self.kept_rows(index)
        group, head = index // self.heads_per_group, index % self.heads_per_group
        return self._spread(group * (self.heads_per_group + 2) + head)

    def kept_rows(self, index: Tensor) -> Tensor:
        """Whole groups: their n/g + 2 blocks. Single heads: their blocks, and K and V of every group."""
        blocks = self.heads_per_group + 2
        if self.whole_groups:
            return self._spread(index[:, None] * blocks + torch.arange(blocks, device=index.device))
        group, head = index // self.heads_per_group, index % self.heads_per_group
        queries = (group * blocks + head).view(self.groups, -1)
        key = torch.arange(self.groups, device=index.device)[:, None] * blocks + self.heads_per_group
        return self._spread(torch.cat([queries, key, key + 1], dim=1))

    def columns(self, index: Tensor) -> Tensor:
        if not self.whole_groups:
            return self._spread(index)
        heads = torch.arange(self.heads_per_group, device=index.device)
        return self._spread(index[:, None] * self.heads_per_group + heads)

    def scored_rows(self, weight: Tensor) -> Tensor:
        return weight

    def scores_of_rows(self, per_row: Tensor) -> Tensor:
        """Eq. 6 and 7: mean over a head's d rows of Q, of K, of V, then the mean of the three.

        A whole group's Q score is the mean over its heads; single heads of a group share its K and V scores.
        """
        blocks = per_row.view(self.groups, self.heads_per_group + 2, self.head_dim).mean(-1)
        query, key, value = blocks[:, :-2], blocks[:, -2], blocks[:, -1]
        if self.whole_groups:
            return (query.mean(1) + key + value) / 3
        return ((query + key[:, None] + value[:, None]) / 3).flatten()

    def scores_of_columns(self, per_column: Tensor) -> Tensor:
        """Mean over the d columns of a head; of a whole group, over all its heads."""
        heads = per_column.view(self.groups, self.heads_per_group, self.head_dim).mean(-1)
        return heads.mean(1) if self.whole_groups else heads.flatten()

    def _spread(self, blocks: Tensor) -> Tensor:
        """Blocks of d rows to rows: block i is rows i d .. i d + d - 1."""
        within = torch.arange(self.head_dim, device=blocks.device)
        return (blocks.reshape(-1, 1) * self.head_dim + within).flatten()
