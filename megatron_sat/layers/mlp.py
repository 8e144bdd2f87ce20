"""Megatron's MLP over the channels kept this step (eq. 10): gate, up and down are cut by one index set."""

from typing import Any

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sat.layers.linear import SparseColumnParallelLinear, SparseRowParallelLinear
from megatron_sat.layers.sparse import Output, SparsePair

_SPARSE = MLPSubmodules(linear_fc1=SparseColumnParallelLinear, linear_fc2=SparseRowParallelLinear)


class SparseMLP(SparsePair, MLP):
    """A drop-in for ``MLP`` in a layer spec: the class itself, or ``ModuleSpec(module=SparseMLP)``."""

    linear_fc1: SparseColumnParallelLinear
    linear_fc2: SparseRowParallelLinear

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules = _SPARSE,
        *,
        pg_collection: Any = None,
        tp_group: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        """What a TransformerLayer builds its MLP from: 0.16 gives a config alone, 0.19 groups and a name."""
        del is_mtp_layer  # 0.19 tells; an MLP does not care
        named = {"name": name} if name is not None else {}
        super().__init__(
            config,
            submodules,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=tp_group if pg_collection is None else pg_collection.tp,
            **named,
        )

    def linear_pair(self) -> tuple[SparseColumnParallelLinear, SparseRowParallelLinear]:
        return self.linear_fc1, self.linear_fc2

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Output:
        """hidden_states: [s, b, h] ([s/p, b, h] under SP). Returns that shape, summed over TP, and a bias."""
        def forward() -> Output:
            return MLP.forward(self, hidden_states, *args, **kwargs)

        kept = self.choose(hidden_states, forward)
        return self.completed(self.scaled(forward()), kept, forward)
