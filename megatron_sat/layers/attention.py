"""Megatron's self-attention over the heads kept this step (eq. 9): Q, K, V and O are cut by one index set."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_sat.layers.linear import SparseColumnParallelLinear, SparseRowParallelLinear
from megatron_sat.layers.sparse import Output, SparsePair
from megatron_sat.sparsity.neurons import Heads


class SparseSelfAttention(SparsePair, SelfAttention):
    """A drop-in for ``SelfAttention`` in a layer spec, with the sparse linear layers as its submodules."""

    linear_qkv: SparseColumnParallelLinear
    linear_proj: SparseRowParallelLinear
    hidden_size_per_attention_head: int
    num_attention_heads_per_partition: int
    num_query_groups_per_partition: int

    def linear_pair(self) -> tuple[SparseColumnParallelLinear, SparseRowParallelLinear]:
        return self.linear_qkv, self.linear_proj

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Output:
        """hidden_states: [s, b, h] ([s/p, b, h] under SP). Returns that shape, summed over TP, and a bias."""
        def forward() -> Output:
            return SelfAttention.forward(self, hidden_states, *args, **kwargs)

        kept = self.choose(hidden_states, forward)
        return self.completed(self.scaled(forward()), kept, forward)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's, which cuts the fused projection by the module's two counts of heads."""
        with self._counting_kept_heads():
            return super().get_query_key_value_tensors(*args, **kwargs)

    @contextmanager
    def _counting_kept_heads(self) -> Iterator[None]:
        """The two counts are those of the heads and query groups that this call computes."""
        columns = self.linear_proj.columns
        if columns is None:
            yield
            return
        assert self.selector is not None and isinstance(self.selector.neurons, Heads)
        neurons, heads = self.selector.neurons, columns.numel() // self.selector.neurons.head_dim
        dense = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        self.num_attention_heads_per_partition = heads
        if neurons.whole_groups:
            self.num_query_groups_per_partition = heads // neurons.heads_per_group
        try:
            yield
        finally:
            self.num_attention_heads_per_partition, self.num_query_groups_per_partition = dense
