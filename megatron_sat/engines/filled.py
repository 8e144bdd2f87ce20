"""The entries of gradients that may be other than zero in the step under way, and what of a section that makes.

They become known when a model chunk has run its first forward of a step, long before its gradients are complete. Where
a shard ends inside a parameter, how many of them lie before its end depends on which they are: the device counts that,
and the host reads the counts when it needs them. By then they have been there for a while.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_sat.engines.base import Filled
from megatron_sat.engines.parcels import Parcel, Section


class FilledEntries:
    """What is known of the step under way; of a parameter that it does not know, everything is filled."""

    def __init__(self, sections: Iterable[Section]) -> None:
        """sections: everywhere a parcel will be asked for."""
        self._sections: dict[Parameter, list[Section]] = {}
        for section in sections:
            self._sections.setdefault(section.parameter, []).append(section)
        self._edges: dict[tuple[Parameter, int], Tensor] = {}
        self._known: dict[Parameter, tuple[int, Tensor]] = {}
        self._counts: list[_Counts] = []
        self._before: dict[tuple[Parameter, int], int] = {}

    def __contains__(self, parameter: Parameter) -> bool:
        return parameter in self._known

    def forget(self) -> None:
        """A new step begins."""
        self._known.clear()
        self._counts.clear()
        self._before.clear()

    def learn(self, entries: Iterable[Filled]) -> list[Tensor]:
        """Take note of those that are not known yet; returns their indices. Does not wait for the device."""
        asked, indices = [], []
        for parameter, dim, index in entries:
            if parameter in self._known or parameter not in self._sections:
                continue
            self._known[parameter] = (dim, index)
            indices.append(index)
            edges = self._edges_of(parameter, dim=dim)
            if edges.numel():
                asked.append((parameter, edges, torch.searchsorted(index, edges)))
        if asked:
            self._counts.append(_Counts(asked))
        return indices

    def parcel(self, section: Section) -> Parcel:
        """What of a section travels: the rows or columns of it that are filled."""
        if section.parameter not in self._known:
            return Parcel(grid=section.grid)
        dim, index = self._known[section.parameter]
        first, last = section.along(dim)
        inside = index[self._position(section, first, dim=dim) : self._position(section, last, dim=dim)]
        return Parcel(grid=section.grid, dim=dim, index=inside - first if first else inside)

    def _edges_of(self, parameter: Parameter, *, dim: int) -> Tensor:
        """Where along ``dim`` sections begin or end inside the parameter: int64, ascending, on its device."""
        if (parameter, dim) not in self._edges:
            ends = {edge for section in self._sections[parameter] for edge in section.along(dim)}
            inner = sorted(ends - {0, _length(parameter, dim=dim)})
            self._edges[parameter, dim] = torch.tensor(inner, dtype=torch.int64, device=parameter.device)
        return self._edges[parameter, dim]

    def _position(self, section: Section, edge: int, *, dim: int) -> int:
        """How many of the parameter's filled rows or columns come before ``edge``."""
        parameter = section.parameter
        if edge == 0:
            return 0
        if edge == _length(parameter, dim=dim):
            return self._known[parameter][1].numel()
        if (parameter, edge) not in self._before:
            for counts in self._counts:
                self._before |= counts.read()
            self._counts.clear()
        return self._before[parameter, edge]


def _length(parameter: Parameter, *, dim: int) -> int:
    """Rows (dim 0) or columns (dim 1) of a parameter, taken as a matrix."""
    return parameter.shape[0] if dim == 0 else parameter.numel() // parameter.shape[0]


class _Counts:
    """Numbers on their way from the device to the host."""

    def __init__(self, asked: list[tuple[Parameter, Tensor, Tensor]]) -> None:
        """asked: of each parameter, edges and how many entries come before each of them."""
        self._edges = torch.cat([edges for _, edges, _ in asked])
        self._owners = [parameter for parameter, edges, _ in asked for _ in range(edges.numel())]
        pair = torch.stack([self._edges, torch.cat([counts for _, _, counts in asked])])
        self._there: torch.cuda.Event | None = None
        if pair.is_cuda:
            self._pair = torch.empty_like(pair, device="cpu", pin_memory=True)
            self._pair.copy_(pair, non_blocking=True)
            self._there = torch.cuda.current_stream().record_event()
        else:
            self._pair = pair

    def read(self) -> dict[tuple[Parameter, int], int]:
        """By parameter and edge. Waits until the device has counted, not for what it was asked for since."""
        if self._there is not None:
            self._there.synchronize()
        edges, counts = self._pair.tolist()
        return {(p, edge): count for p, edge, count in zip(self._owners, edges, counts, strict=True)}
