"""The matrices whose single weights a baseline may leave out: q, k, v, proj, gate, up, down of every layer.

Megatron keeps q, k, v in one parameter, group by group, and gate and up in another; tensor parallelism cuts both along
their rows, proj and down along their columns. Here each is again the matrix that Hugging Face's linear layers have,
whole, so that "the half of least magnitude of each matrix" is the same at any tensor-parallel size. Embeddings, norms
and the output layer are not among them.

Shapes: `R`, `C` rows and columns of a whole matrix.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Matrix:
    """One matrix, as it lies in a parameter of this rank."""

    layer: int
    """Global layer number, from 1."""
    name: str
    """q, k, v, proj, gate, up, down, or fc1 where there is no gate."""
    parameter: Parameter
    rows: tuple[int, ...] | None
    """Rows of the parameter that are this matrix's; None: all."""
    cut: int
    """The dimension that tensor parallelism cuts."""
    group: dist.ProcessGroup
    """The ranks it is cut over."""

    @property
    def key(self) -> str:
        """Unique over the model: "<layer>.<name>"."""
        return f"{self.layer}.{self.name}"

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        rows = self.parameter.shape[0] if self.rows is None else len(self.rows)
        shape = [rows, self.parameter.shape[1]]
        shape[self.cut] *= self.group.size()
        return shape[0], shape[1]

    def index(self) -> Tensor:
        """int64, on the parameter's device: its rows of the parameter."""
        rows = range(self.parameter.shape[0]) if self.rows is None else self.rows
        return torch.tensor(list(rows), device=self.parameter.device)

    def whole(self, tensor: Tensor) -> Tensor:
        """[R, C] of a tensor of the parameter's shape (weight, gradient, mask), from all tensor-parallel ranks;
        collective over them."""
        mine = tensor.detach().index_select(0, self.index()).contiguous()
        if self.group.size() == 1:
            return mine
        sent = mine.view(torch.uint8) if mine.dtype == torch.bool else mine
        parts = [torch.empty_like(sent) for _ in range(self.group.size())]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts, self.cut).to(mine.dtype)

    def put(self, whole: Tensor, *, into: Tensor) -> None:
        """Write this rank's part of ``whole`` [R, C] into its rows of a tensor of the parameter's shape."""
        part = whole.chunk(self.group.size(), self.cut)[self.group.rank()]
        into.index_copy_(0, self.index(), part.to(into.device))


def find_matrices(chunks: Iterable[Module], *, group: dist.ProcessGroup) -> list[Matrix]:
    """Those of this rank's model chunks, in the model's order. group: the tensor-parallel ranks."""
    layers: list[Any] = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "layer_number")]
    found = []
    for layer in layers:
        for owner in (getattr(layer, "self_attention", None), getattr(layer, "mlp", None)):
            if owner is not None:
                found += list(_of_module(owner, layer=layer.layer_number, group=group))
    return found


def _of_module(module: Any, *, layer: int, group: dist.ProcessGroup) -> Iterator[Matrix]:
    def matrix(name: str, parameter: Parameter, *, rows: Iterable[int] | None, cut: int) -> Matrix:
        mine = None if rows is None else tuple(rows)
        return Matrix(layer=layer, name=name, parameter=parameter, rows=mine, cut=cut, group=group)

    if hasattr(module, "linear_qkv"):
        fused = module.linear_qkv.weight
        for name, rows in _of_qkv(module).items():
            yield matrix(name, fused, rows=rows, cut=ROWS)
        yield matrix("proj", module.linear_proj.weight, rows=None, cut=COLUMNS)
        return
    fused, gated = module.linear_fc1.weight, module.config.gated_linear_unit
    half = fused.shape[0] // 2
    if gated:
        yield matrix("gate", fused, rows=range(half), cut=ROWS)
        yield matrix("up", fused, rows=range(half, 2 * half), cut=ROWS)
    else:
        yield matrix("fc1", fused, rows=None, cut=ROWS)
    yield matrix("down", module.linear_fc2.weight, rows=None, cut=COLUMNS)


def _of_qkv(attention: Any) -> dict[str, list[int]]:
    """Rows of q, k, v in the fused weight: group after group, the heads of a group, then its key, then its value."""
    size, groups = attention.hidden_size_per_attention_head, attention.num_query_groups_per_partition
    heads = attention.num_attention_heads_per_partition // groups
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    for group in range(groups):
        first = group * (heads + 2) * size
        rows["q"] += range(first, first + heads * size)
        rows["k"] += range(first + heads * size, first + (heads + 1) * size)
        rows["v"] += range(first + (heads + 1) * size, first + (heads + 2) * size)
    return rows
