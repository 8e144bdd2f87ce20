"""A weight cut once a step: packed before its first use, its gradients added up packed, unpacked after the last.

The fast twin of `gather`, which copies the kept part for every micro-batch. A `Pack` needs a gradient buffer of the
weight's shape that is zero when the step begins (``main_grad``, as Megatron's DDP keeps one): the front of that buffer
serves as the packed accumulator, so nothing of the weight's size is allocated, and after the last backward the sums
move to their rows or columns. Whoever watches the weight's own gradient (DDP's hooks) sees them there in time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_sat.sparsity.gather import shape_alone
from megatron_sat.sparsity.unpack import unpack


@dataclass(frozen=True, eq=False, kw_only=True)
class Packing:
    """One step in which weights are packed; each weight is packed once for it. Compared by identity."""

    uses: int
    """Forwards of each module that get a backward in this step: its micro-batches."""


class Pack:
    """The kept rows (dim 0) or columns (dim 1) of one weight for one step."""

    def __init__(
        self,
        weight: Parameter,
        index: Tensor,
        *,
        dim: int,
        uses: int,
        buffer: Tensor | None = None,
        packed: bool = False,
        values: bool = True,
    ) -> None:
        """index: [k] int64, distinct. uses: how many forwards of the step get a backward (its micro-batches).

        buffer: the last step's, taken over if it fits, so that a rung's packed weights stay where they are.
        packed: what is kept lies in ``buffer`` already. values: whether the weight's are wanted; without, gradients are
        added up alone, and nothing is copied.
        """
        assert hasattr(weight, "main_grad"), "a pack adds up in the weight's main_grad"
        self._weight, self._index, self._dim, self._left = weight, index, dim, uses
        if not values:
            self.buffer = shape_alone(weight.detach(), index, dim=dim)
            return
        shape = (index.numel(), weight.size(1)) if dim == 0 else (weight.size(0), index.numel())
        self.buffer = weight.detach().new_empty(shape) if buffer is None or buffer.shape != shape else buffer
        if not packed:
            torch.index_select(weight.detach(), dim, index, out=self.buffer)

    def use(self) -> Tensor:
        """The packed weight, [k, h] or [h, k], for one forward.

        It carries ``main_grad``, where the backward adds this use's weight gradient, and
        ``grad_added_to_main_grad``, by which Megatron's linear layers tell that they did.
        """
        packed: Any = _Use.apply(self._weight, self)
        packed.main_grad = self._sums()
        packed.grad_added_to_main_grad = False
        return packed

    def leaf(self) -> Tensor:
        """The packed weight by itself, without the weight behind it; who takes a gradient calls `used`."""
        leaf: Any = self.buffer.detach().requires_grad_()
        leaf.main_grad = self._sums()
        leaf.grad_added_to_main_grad = False
        return leaf

    def _sums(self) -> Tensor:
        """The accumulator: the front of the weight's gradient buffer, in the packed weight's shape."""
        assert self._left > 0, "a pack is used once more than it was made for"
        return self._weight.main_grad.view(-1)[: self.buffer.numel()].view(self.buffer.shape)  # type: ignore[attr-defined]

    def used(self, weight: Parameter) -> None:
        """A backward is through. After the last one the sums go where they belong, and the pack is spent."""
        assert self._left > 0, "a pack is used once more than it was made for"
        self._left -= 1
        if self._left == 0:
            unpack(weight.main_grad, self._index, dim=self._dim)  # type: ignore[attr-defined]


class _Use(torch.autograd.Function):
    """weight -> packed weight. Its gradient is in main_grad already; what flows back only says that it is there."""

    @staticmethod
    def forward(ctx: Any, weight: Parameter, pack: Pack) -> Tensor:
        ctx.pack, ctx.weight = pack, weight
        return pack.buffer.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        weight = ctx.weight
        ctx.pack.used(weight)
        weight.grad_added_to_main_grad = True
        return torch.empty_like(weight), None  # never read: hooks of the weight run only where a gradient arrives
