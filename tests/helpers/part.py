"""Gradients of which some rows or columns alone are not zero, in an engine around a plain model."""

import zlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from megatron_sat.engines.base import Filled
from megatron_sat.engines.megatron import MegatronEngine
from tests.helpers.engine_state import named


class Part:
    """Some rows or columns of each layer's matrices, others in each step; what is left of them has no gradient."""

    def __init__(self, engine: MegatronEngine, *, dense: Iterable[int] = ()) -> None:
        """dense: steps, from 0, in which everything has a gradient."""
        self.engine, self.step, self.dense = engine, 0, set(dense)
        for name, parameter in named(engine):
            dim = self.dim_of(name)
            if dim is not None:
                parameter.register_hook(self.mask(name, parameter, dim))

    @staticmethod
    def dim_of(name: str) -> int | None:
        columns = "linear_fc2" in name or "linear_proj" in name
        return 0 if "linear_fc1" in name or "linear_qkv" in name else 1 if columns else None

    def index(self, name: str, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.step)
        return torch.randperm(length, generator=generator)[: length // 2].sort().values

    def mask(self, name: str, parameter: torch.nn.Parameter, dim: int) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            if self.step in self.dense:
                return gradient
            index = self.index(name, parameter.shape[dim])
            return torch.zeros_like(gradient).index_copy_(dim, index, gradient.index_select(dim, index))

        return hook

    def entries(self) -> Iterator[Filled]:
        if self.step in self.dense:
            return
        for name, parameter in named(self.engine):
            dim = self.dim_of(name)
            if dim is not None:
                yield parameter, dim, self.index(name, parameter.shape[dim])
