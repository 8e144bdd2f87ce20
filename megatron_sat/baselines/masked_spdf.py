"""SPDF in the program's own loop: the masks of `spdf`, under every parallelism of Megatron, and through checkpoints.

`spdf.Spdf` is the same for modules of plain torch, whose weights are whole on each rank.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from megatron_sat.baselines.course import Clear
from megatron_sat.baselines.masks import Masks
from megatron_sat.baselines.matrices import Matrix
from megatron_sat.baselines.settings import SpdfConfig
from megatron_sat.baselines.spdf import magnitude_mask
from megatron_sat.sparsity.selection import generator_of


class MaskedSpdf:
    """A `Course`: a part of each matrix is zero until a step, then everything trains."""

    def __init__(self, masks: Masks, *, config: SpdfConfig, clear: Clear) -> None:
        """`masks` is this course's from here on."""
        self.masks, self._config, self._clear = masks, config, clear
        self._step, self._restored = 0, False

    @property
    def is_sparse(self) -> bool:
        """Whether the step under way is one of those with masks."""
        return self._step <= self._config.until

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Raises ValueError for the masks of another model."""
        self._restored = self.masks.load(saved)

    def start(self, step: int) -> None:
        """Choose by the weights as they are now, unless a checkpoint's masks were restored."""
        self._step = step
        if not self.is_sparse:
            return
        if not self._restored:
            for matrix in self.masks.matrices:
                self.masks.set(matrix, self._choose(matrix))
        self._clear(self.masks.left_out())

    def begin_step(self, step: int) -> None:
        self._step = step

    def silence(self) -> None:
        """After the reduction of gradients: what is left out gets none."""
        if self.is_sparse:
            self.masks.silence()

    def state(self) -> dict[str, Tensor]:
        """The masks, as long as a step with them is to come."""
        return self.masks.state() if self._step < self._config.until else {}

    def _choose(self, matrix: Matrix) -> Tensor:
        if self._config.mask == "magnitude":
            return magnitude_mask(matrix.whole(matrix.parameter), rate=self._config.rate)
        return random_mask(matrix.shape, rate=self._config.rate, seed=self._config.seed, key=matrix.key)


def random_mask(shape: tuple[int, int], *, rate: Fraction, seed: int, key: str) -> Tensor:
    """Bool of ``shape``: ⌊n rate⌋ entries at random are false. A function of the arguments alone."""
    size = shape[0] * shape[1]
    order = torch.rand(size, generator=generator_of(f"{seed}/{key}"), dtype=torch.float64).argsort(stable=True)
    mask = torch.ones(size, dtype=torch.bool)
    mask[order[: math.floor(size * rate)]] = False
    return mask.view(shape)
