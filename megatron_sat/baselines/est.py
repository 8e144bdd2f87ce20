"""EST, Evolving Subnetwork Training (Li et al., 2024), on the sparse layers of SAT: its steps are really shorter.

A step trains a random part of the model: of each layer's heads and channels a share, their outputs over that share,
and in the first of three stages of the layers too. In the second all layers take part, in the third everything. Heads
and channels are SAT's with another setting (uniform, sampled, rescaled); here are the layers.

Left open by what we could read of the source, and ours: as many layers as a share comes to, rounded down, at least one,
are drawn anew in each step from all of them; each branch of a layer that takes part, attention and MLP, is multiplied
by the number of layers over those that take part, as its heads and channels are. A layer that is left out passes its
input on.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_sat.baselines.settings import EstConfig
from megatron_sat.sparsity.selection import generator_of
from megatron_sat.sparsity.selector import Selector


class Est:
    """A `Course`: tells the selectors, step for step, which layers take part. It carries nothing from step to step."""

    def __init__(self, selectors: Sequence[Selector], *, config: EstConfig, num_layers: int) -> None:
        """selectors: of this rank's modules. num_layers: of the whole model."""
        self._selectors, self._config, self._num_layers = selectors, config, num_layers

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Nothing is taken over: a step's layers follow from its number."""

    def start(self, step: int) -> None:
        """Nothing to do."""

    def begin_step(self, step: int) -> None:
        """The step's layers; when it ends the selectors forget."""
        left_out = layers_left_out(step, config=self._config, num_layers=self._num_layers)
        scale = self._num_layers / (self._num_layers - len(left_out))
        for selector in self._selectors:
            selector.left_out, selector.layer_scale = selector.place.layer in left_out, scale

    def state(self) -> dict[str, Tensor]:
        """Nothing goes through a checkpoint."""
        return {}


def layers_left_out(step: int, *, config: EstConfig, num_layers: int) -> frozenset[int]:
    """Numbers, from 1, of the layers that sit ``step`` out; a function of the arguments alone, alike on all ranks."""
    count = num_layers - config.kept(num_layers, step=step)
    drawn = torch.rand(num_layers, generator=generator_of(f"{config.seed}/{step}/layers"), dtype=torch.float64)
    return frozenset(int(place) + 1 for place in drawn.argsort(stable=True)[:count])
