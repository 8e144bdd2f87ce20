"""The selection noise of several selectors, drawn together and one step ahead.

What a unit's noise is depends on seed, step, layer and kind alone (`selection.uniform_draw`); drawn one module at a
time it costs the host 0.2 ms each, just where the device waits for it. Here one copy and one pair of logarithms serve
all modules, and the next step's are drawn when this step's last module has chosen: the device has the head to do then.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sat.sparsity.selection import gumbel, uniform_draw


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one selector takes: units [first, last) of a layer's ``total``."""

    seed: int
    kind: str
    layer: int
    total: int
    first: int
    last: int


Take = Callable[[int, torch.device], Tensor]
"""(draw, device) -> [last - first] fp32 noise of one part for the step ``draw``."""


class Noise:
    """Draws for all parts that joined. Not more than two steps' noise is kept."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._drawn: dict[int, list[Tensor]] = {}
        self.following: int | None = None
        """The step whose noise is drawn ahead once the last part has taken this one's; None: none is."""

    def join(self, part: Part) -> Take:
        """How the part takes its noise. The last to join is thought to be the last to take."""
        number = len(self._parts)
        self._parts.append(part)
        self._drawn.clear()

        def take(draw: int, device: torch.device) -> Tensor:
            if draw not in self._drawn:
                self._drawn[draw] = self._draw(draw, device=device)
            mine = self._drawn[draw][number]
            if number == len(self._parts) - 1:
                self._look_ahead(draw, device=device)
            return mine

        return take

    def _look_ahead(self, draw: int, *, device: torch.device) -> None:
        self._drawn = {draw: self._drawn[draw]}
        if self.following is not None and self.following != draw:
            self._drawn[self.following] = self._draw(self.following, device=device)

    def _draw(self, draw: int, *, device: torch.device) -> list[Tensor]:
        drawn = [
            uniform_draw(p.total, seed=p.seed, step=draw, layer=p.layer, kind=p.kind)[p.first : p.last]
            for p in self._parts
        ]
        return list(gumbel(torch.cat(drawn), device=device).split([len(mine) for mine in drawn]))
