"""SPDF (Thangarasa et al., 2023): a part of the weights, chosen once, is zero until a step; then all of them train.

Adapted as the SAT paper does: on a pre-trained model, whose weights of least magnitude leave (its authors, who train
from the beginning, leave out random ones), r = 1/2 of each matrix, until the step η at which SAT's ladder would begin.

Masks, so nothing is faster by them: they show what a method that computes half as much would learn, and its cost is
counted by `flops_share`. Weights are zero at the start, and their gradients as they are made; an optimizer that
starts from nothing then leaves them zero, bit for bit, with momentum and with decay. From η on they learn from zero.
"""

import math
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import Parameter

RATE = Fraction(1, 2)
"""The share of each matrix that is left out, in the comparison of the SAT paper."""


def magnitude_mask(weight: Tensor, *, rate: Fraction) -> Tensor:
    """Bool of the weight's shape: true for the ⌈n (1 - rate)⌉ entries of largest magnitude; of equals, the earlier."""
    left_out = math.floor(weight.numel() * rate)
    order = weight.detach().abs().flatten().argsort(descending=True, stable=True)
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[order[weight.numel() - left_out :]] = False
    return mask.view(weight.shape)


class Spdf:
    """Holds the omitted entries of some weights at zero until a step."""

    def __init__(self, weights: Iterable[Parameter], *, rate: Fraction = RATE, until: int) -> None:
        """weights: the matrices of the linear layers, whole on this rank. until: η, the last sparse step, at least 1.

        The weights are changed at once, before an optimizer copies them. Raises ValueError for a rate outside [0, 1),
        a step below 1, and a weight that has been left in shards.
        """
        if not 0 <= rate < 1:
            raise ValueError(f"the rate of SPDF must be in [0, 1), got {rate}; the SAT paper compares with 1/2")
        if until < 1:
            raise ValueError(f"the last sparse step of SPDF must be at least 1, got {until}; a dense run has no SPDF")
        self.weights, self.until = list(weights), until
        if any(hasattr(weight, "ds_shape") for weight in self.weights):
            raise ValueError(
                "SPDF masks need whole weights, ZeRO-3 has left them in shards; use ZeRO-2 (stage 2) or less"
            )
        self.masks = [magnitude_mask(weight, rate=rate) for weight in self.weights]
        self._step = 1
        for weight, mask in zip(self.weights, self.masks, strict=True):
            with torch.no_grad():
                weight.mul_(mask)
            weight.register_hook(self._silence(mask))

    def begin_step(self, step: int) -> None:
        """Tell which step comes, from 1; a resumed run begins with the one after its checkpoint's."""
        self._step = step

    @property
    def is_sparse(self) -> bool:
        """Whether the step under way is one of those with masks."""
        return self._step <= self.until

    def _silence(self, mask: Tensor) -> "_Silence":
        return _Silence(self, mask)


class _Silence:
    """A hook on a weight's gradient: what is left out gets none, before anything is reduced or clipped."""

    def __init__(self, spdf: Spdf, mask: Tensor) -> None:
        self._spdf, self._mask = spdf, mask

    def __call__(self, gradient: Tensor) -> Tensor | None:
        if not self._spdf.is_sparse:
            return None
        self._mask = self._mask.to(gradient.device)  # the model may have moved since
        return gradient * self._mask


def flops_share(*, rate: Fraction, until: int, steps: int) -> Fraction:
    """Operations of the masked matrices in a whole run over those of dense training, exactly."""
    return 1 - rate * Fraction(min(until, steps), steps)
