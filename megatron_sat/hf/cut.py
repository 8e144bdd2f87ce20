"""A linear layer of a Hugging Face model that computes with some of its rows or columns, when it is told to.

`CutLinear` is torch's own layer with one attribute more; a layer becomes one, and torch's own again, by its class
alone, so that its parameters, their names, and everything hung on it (hooks, DeepSpeed's marks) stay where they are.
Which rows or columns, is said for one forward by a `Cut`; without one the layer is torch's, bit for bit.

Two ways to cut. Gathered: the kept part is copied for every forward, and every backward returns a gradient of the
weight's own shape (`sparsity.gather`). Packed: copied once a step; the gradients of the step's micro-batches add up in
the packed shape, and the last of them hands the sum over in the weight's shape. Both add the same numbers in the same
order. Packing must be told which micro-batch is the last, and wants nobody to look at gradients before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear

from megatron_sat.sparsity.gather import keep_columns, keep_rows


class Pack:
    """The kept rows (dim 0) or columns (dim 1) of one weight, copied once for a step of several micro-batches."""

    def __init__(self, weight: Tensor, index: Tensor, *, dim: int) -> None:
        """index: [k] int64, distinct, along ``dim`` of the weight (a bias has dim 0 alone)."""
        self.buffer = weight.detach().index_select(dim, index)
        self.index, self.dim = index, dim
        self.sums: Tensor | None = None
        """Gradients that are not handed over yet, in the packed shape; None: there are none."""

    def use(self, weight: Tensor, *, last: bool) -> Tensor:
        """The packed weight for one forward. last: its backward is the step's last one of this weight."""
        return _Use.apply(weight, self, last)


class _Use(torch.autograd.Function):
    """weight -> packed weight. Its gradient waits in the pack until the last backward, which hands over the sum."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, pack: Pack, last: bool) -> Tensor:
        ctx.pack, ctx.last, ctx.shape = pack, last, weight.shape
        return pack.buffer.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        pack, (grad,) = ctx.pack, grads
        sums = grad if pack.sums is None else pack.sums.add_(grad)
        if not ctx.last:
            pack.sums = grad.clone() if pack.sums is None else sums
            return None, None, None
        pack.sums = None
        return sums.new_zeros(ctx.shape).index_copy_(pack.dim, pack.index, sums), None, None


@dataclass(frozen=True, eq=False, kw_only=True)
class Cut:
    """What one linear layer computes with in one forward."""

    index: Tensor
    """[k] int64, ascending: rows (outputs, dim 0) or columns (inputs, dim 1) of the weight."""
    dim: int
    """0 cuts weight and bias to rows; 1 cuts the weight to columns and leaves the bias, of the outputs, whole."""
    scale: float = 1.0
    """What the product is multiplied by, before the bias."""
    packs: "Packs | None" = None
    """Where the packed weight and bias are; None: gathered."""
    last: bool = True
    """Whether this forward's backward is the step's last. Read where there are packs."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Packs:
    """One layer's packed parameters of one step."""

    weight: Pack
    bias: Pack | None
    """None where the layer has no bias, or a whole one."""

    @property
    def waiting(self) -> bool:
        """Whether gradients of this step were never handed over."""
        return self.weight.sums is not None


def pack(layer: Linear, index: Tensor, *, dim: int) -> Packs:
    """The packs of one layer, made from its parameters as they are now."""
    with_bias = dim == 0 and layer.bias is not None
    return Packs(
        weight=Pack(layer.weight, index, dim=dim), bias=Pack(layer.bias, index, dim=0) if with_bias else None
    )


class CutLinear(Linear):
    """torch's linear layer, cut for a forward where ``cut`` is set."""

    cut: Cut | None = None
    observe: Callable[[Tensor], None] | None = None
    """Called with each input, before anything is computed."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], or [..., k] of the kept columns. Returns [..., out], or [..., k] of the kept rows."""
        if self.observe is not None:
            self.observe(x)
        cut = self.cut
        if cut is None:
            return super().forward(x)
        weight, bias = _kept_part(self.weight, self.bias, cut=cut)
        if cut.scale == 1.0:
            return F.linear(x, weight, bias)
        product = F.linear(x, weight) * cut.scale
        return product if bias is None else product + bias.to(product.dtype)  # autocast's bf16 stays bf16


def make_cuttable(layer: Linear) -> CutLinear:
    """The same layer, cuttable from now on. Its type must be torch's own."""
    assert type(layer) is Linear
    layer.__class__ = CutLinear  # type: ignore[assignment]  # it adds no state that __init__ would have made
    assert isinstance(layer, CutLinear)
    return layer


def make_plain(layer: CutLinear) -> None:
    """The same layer, torch's own again."""
    for attribute in ("cut", "observe"):
        vars(layer).pop(attribute, None)
    layer.__class__ = Linear  # type: ignore[assignment]


def _kept_part(weight: Tensor, bias: Tensor | None, *, cut: Cut) -> tuple[Tensor, Tensor | None]:
    if cut.packs is not None:
        packed = cut.packs.weight.use(weight, last=cut.last)
        if bias is not None and cut.packs.bias is not None:
            bias = cut.packs.bias.use(bias, last=cut.last)
        return packed, bias
    if cut.dim == 1:
        return keep_columns(weight, cut.index), bias
    return keep_rows(weight, cut.index), None if bias is None else keep_rows(bias, cut.index)
