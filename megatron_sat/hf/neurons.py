"""Where the heads lie in a Hugging Face attention: in three weights, Q, K and V, instead of Megatron's fused one.

The arithmetic of heads and query groups is that of `sparsity.neurons.Heads`; here is the other layout. Rows are counted
over the three weights one below the other: n d rows of Q, head after head, then g d rows of K, then g d of V.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sat.sparsity.neurons import Heads


@dataclass(frozen=True, kw_only=True)
class SplitHeads(Heads):
    """Heads of an attention with q_proj, k_proj and v_proj; head i belongs to query group i // (n/g)."""

    def rows_of_each(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of Q, of K and of V, each counted from 0, that belong to the units ``index`` alone. Ascending.

        Of single heads that is rows of Q; the two others are empty, for their group shares K and V.
        """
        query = self.columns(index)  # Q has a row where O has a column
        alone = self._spread(index) if self.whole_groups else index.new_empty(0)
        return query, alone, alone

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the three weights, one below the other, that belong to the units ``index`` alone."""
        query, key, value = self.rows_of_each(index)
        return self._below(query, key, value)

    def kept_rows(self, index: Tensor) -> Tensor:
        """The same, and what all share: K and V whole where heads leave singly."""
        query, key, value = self.rows_of_each(index)
        if not self.whole_groups:
            key = value = torch.arange(self.groups * self.head_dim, device=index.device)
        return self._below(query, key, value)

    def scores_of_rows(self, per_row: Tensor) -> Tensor:
        """[units] from a score for each row of the three weights, one below the other (eq. 6, 7)."""
        heads, groups = self.groups * self.heads_per_group * self.head_dim, self.groups * self.head_dim
        query, key, value = per_row.split([heads, groups, groups])
        shape = (self.groups, -1, self.head_dim)
        fused = torch.cat([query.view(shape), key.view(shape), value.view(shape)], dim=1)
        return super().scores_of_rows(fused.flatten())

    def _below(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first_key = self.groups * self.heads_per_group * self.head_dim
        return torch.cat([query, key + first_key, value + first_key + self.groups * self.head_dim])
