"""Mixed Sparsity Training (MST), by masks: its reference. Published for GPT-2, pre-trained from scratch.

Three phases (`sparsity.schedule`, kind mst): the model becomes sparse in cubic stages, stays ultra-sparse, and is
restored as the mirror. The share left out is spread over the matrices as Erdős-Rényi does: the density of one is
proportional to (n_in + n_out) / (n_in n_out), or 1 where that is more. After every Δ-th step's backward, in the place
of its update, the masks change by mixed growing: of n₁ weights that take part the smallest go, and of all that then
take no part those of largest gradient and random ones come. What comes starts at zero; what goes and comes at once
keeps its value. In the ultra-sparse phase attention is local and strided; it is dense otherwise. Evaluation on the way
is of the model as it is then, as in the source; the end is dense.

Taken from the published description and program; ours where both are silent: moments of what goes are set to zero.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from megatron_sat.baselines.course import Clear
from megatron_sat.baselines.masks import Masks
from megatron_sat.baselines.settings import MstConfig
from megatron_sat.sparsity.growing import Growing, change_of, replaced_share
from megatron_sat.sparsity.schedule import build_schedule
from megatron_sat.sparsity.selection import generator_of


class MaskedMst:
    """A `Course`: masks that follow a schedule and change on the way."""

    def __init__(
        self,
        masks: Masks,
        *,
        config: MstConfig,
        attentions: Sequence[Any],
        clear: Clear,
        gather_gradients: Callable[[], None],
    ) -> None:
        """attentions: modules with a ``hybrid_stride``. gather_gradients: makes those of this rank whole. `masks` is
        this course's from here on."""
        assert config.schedule.interval is not None
        self.masks, self._config, self._interval = masks, config, config.schedule.interval
        self._rate: Callable[[int], Fraction] = build_schedule(config.schedule).rate
        self._attentions, self._clear, self._gather = attentions, clear, gather_gradients
        self._step = 0

    # -- Course

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Raises ValueError for the masks of another model."""
        if not self.masks.load(saved):
            self.masks.lift()

    def start(self, step: int) -> None:
        self._clear(self.masks.left_out())

    def begin_step(self, step: int) -> None:
        self._step = step
        stride = self._config.attention_stride or None
        for attention in self._attentions:
            attention.hybrid_stride = stride if self._rate(step) == self._config.schedule.omission_rate else None

    def state(self) -> dict[str, Tensor]:
        return self.masks.state() if self._rate(self._step) or self.is_change else {}

    # -- inside a step

    @property
    def is_change(self) -> bool:
        """Whether the step under way changes the masks instead of updating."""
        return self._step % self._interval == 0 and 0 < self._step < self._config.growing.last_step

    def after_reduction(self) -> None:
        """Change the masks where this step does, and let no gradient through to what takes no part."""
        if self.is_change:
            self._gather()
            self._change()
            self._clear(self.masks.left_out())
        self.masks.silence()

    @torch.no_grad()
    def _change(self) -> None:
        matrices = self.masks.matrices
        target = self._rate(self._step + 1)
        shares = densities([matrix.shape for matrix in matrices], sparsity=target)
        for matrix, density in zip(matrices, shares, strict=True):
            gradient: Tensor = matrix.parameter.main_grad  # type: ignore[attr-defined]
            mask = change_mask(
                self.masks.whole(matrix),
                weight=matrix.whole(matrix.parameter),
                gradient=matrix.whole(gradient),
                density=density,
                growing=self._config.growing,
                step=self._step,
                generator=generator_of(f"{self._config.seed}/{self._step}/{matrix.key}"),
            )
            self.masks.set(matrix, mask)


def densities(shapes: Sequence[tuple[int, int]], *, sparsity: Fraction) -> list[Fraction]:
    """Erdős-Rényi: which share of each matrix takes part, so that ``sparsity`` of all their weights does not.

    Where a share would be above 1 the matrix stays whole, and the others make up for it.
    """
    raw = [Fraction(rows + columns, rows * columns) for rows, columns in shapes]
    whole: set[Fraction] = set()
    while True:
        rest = [shape for shape, each in zip(shapes, raw, strict=True) if each not in whole]
        room = (1 - sparsity) * _size(shapes) - (_size(shapes) - _size(rest))
        factor = room / sum((Fraction(rows + columns) for rows, columns in rest), Fraction(0)) if rest else Fraction(0)
        above = [each for each in raw if each not in whole and each * factor > 1]
        if not above:
            return [Fraction(1) if each in whole else each * factor for each in raw]
        whole.add(max(above))


def _size(shapes: Iterable[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)


def change_mask(
    mask: Tensor,
    *,
    weight: Tensor,
    gradient: Tensor,
    density: Fraction,
    growing: Growing,
    step: int,
    generator: torch.Generator,
) -> Tensor:
    """Bool [R, C]: what takes part after the change of step ``step``. All four of the whole matrix.

    density: the share that is to take part. Equal scores go to the earlier entry.
    """
    kept, size = mask.flatten(), mask.numel()
    taking_part = int(kept.sum())
    missing = int((1 - density) * size - (size - taking_part))  # towards zero, either way
    share = replaced_share(step, replaced=growing.replaced, last_step=growing.last_step)
    change = change_of(taking_part, wanted=taking_part - missing, share=share, random_share=growing.random_share)
    chosen = torch.zeros_like(kept)
    chosen[_best(weight.abs().flatten(), among=kept, count=change.stay)] = True
    chosen[_best(gradient.abs().flatten(), among=~chosen, count=change.by_score)] = True
    random = torch.rand(size, generator=generator, dtype=torch.float64).to(kept.device)
    chosen[_best(random, among=~chosen, count=change.at_random)] = True
    return chosen.view_as(mask)


def _best(scores: Tensor, *, among: Tensor, count: int) -> Tensor:
    """int64 [count]: where the largest of ``scores`` [n], none negative, are, of those that ``among`` says."""
    return torch.where(among, scores.double(), -1.0).argsort(descending=True, stable=True)[:count]


def attentions_of(chunks: Iterable[Module]) -> list[Module]:
    """The core attentions that can be hybrid."""
    return [module for chunk in chunks for module in chunk.modules() if hasattr(module, "hybrid_stride")]
