"""Entries that sit an update out: weights and optimizer state bit-identical before and after it (the paper's eq. 2).

A zero gradient is not enough: momentum and weight decay still move an entry. So the held entries of the
weights that the inner torch optimizer steps on, and of every state tensor beside them, are copied before its
step and written back after it. This costs one transient copy of what is held, and nothing where nothing is.

Where the optimizer has a parameter, whole or in part, `stretch` says. The model's own 16-bit weights follow, being
rounded from copies that did not change.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from megatron_sat.engines.base import Held
from megatron_sat.engines.pieces import Piece, pieces
from megatron_sat.engines.stretch import Find, Stretch, stretches_of_megatron


def hold_entries(optimizer: MegatronOptimizer, *, entries: Callable[[], Iterable[Held]]) -> None:
    """Before each step of `optimizer` ask `entries` what must not move, and see to it.

    entries: called once a step on every inner optimizer; parameters that belong to another one are passed over.
    Raises ValueError for an optimizer whose state cannot be held entry by entry.
    """
    inner = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for wrapper in inner:
        if getattr(wrapper, "is_stub_optimizer", False):
            continue
        _refuse_unknown(wrapper)
        hold_stretches(wrapper.optimizer, find=stretches_of_megatron(wrapper), entries=entries)


def hold_stretches(optimizer: torch.optim.Optimizer, *, find: Find, entries: Callable[[], Iterable[Held]]) -> None:
    """The same for one torch optimizer. entries: called before each of its steps, and there may be several an update
    (DeepSpeed's go group by group); what the step's parameter groups do not hold is passed over."""
    optimizer.register_step_pre_hook(lambda *_: holder.copy())
    optimizer.register_step_post_hook(lambda *_: holder.write_back())
    holder = _Holder(optimizer, find, entries)


def _refuse_unknown(wrapper: MegatronOptimizer) -> None:
    if not isinstance(wrapper, FP32Optimizer | Float16OptimizerWithFloat16Params | DistributedOptimizer):
        raise ValueError(
            "held entries need --optimizer adam or sgd in one of megatron.core's three wrappers, got "
            f"{type(wrapper).__name__}; pass --sat-omitted-neurons optimizer"
        )
    if isinstance(wrapper.optimizer, HybridDeviceOptimizer):
        raise ValueError(
            "held entries need the optimizer state on one device, got --optimizer-cpu-offload; leave it out "
            "or pass --sat-omitted-neurons optimizer"
        )
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        dtype = getattr(wrapper.config, name)
        if dtype.itemsize == 1:
            raise ValueError(
                f"held entries need optimizer state without a shared scale, got --{name.replace('_', '-')} "
                f"{dtype}: its scale changes with every step; use bf16 or fp32, or pass "
                "--sat-omitted-neurons optimizer"
            )


@dataclass(frozen=True)
class _Kept:
    """Copies of the held entries of one rectangle: of the weights, and of each state tensor there is."""

    stretch: Stretch
    piece: Piece
    dim: int
    index: Tensor
    weights: Tensor
    state: dict[str, Tensor]


class _Holder:
    """What happens before and after a step of one torch optimizer, and what the first passes to the second."""

    def __init__(self, optimizer: torch.optim.Optimizer, find: Find, entries: Callable[[], Iterable[Held]]) -> None:
        self._optimizer = optimizer
        self._find = find
        self._entries = entries
        self._kept: list[_Kept] = []

    @torch.no_grad()
    def copy(self) -> None:
        own = {id(main) for group in self._optimizer.param_groups for main in group["params"]}
        for parameter, dim, index in self._entries():
            stretch = self._find(parameter)
            if stretch is None or id(stretch.main) not in own:
                continue
            columns = stretch.shape.numel() // stretch.shape[0]
            index = index.to(stretch.main.device)
            if index.dtype == torch.bool:
                index = index.nonzero().flatten()
            for piece in pieces(stretch.start, stretch.start + stretch.length, columns=columns):
                first, last = (piece.rows, piece.columns)[dim]
                inside = index[(index >= first) & (index < last)] - first
                if inside.numel():
                    self._kept.append(self._copy_piece(stretch, piece=piece, dim=dim, index=inside))

    def _copy_piece(self, stretch: Stretch, *, piece: Piece, dim: int, index: Tensor) -> _Kept:
        return _Kept(
            stretch=stretch,
            piece=piece,
            dim=dim,
            index=index,
            weights=piece.of(stretch.of(stretch.main)).index_select(dim, index),
            state={
                name: piece.of(stretch.of(tensor)).index_select(dim, index)
                for name, tensor in self._state_of(stretch.main).items()
            },
        )

    @torch.no_grad()
    def write_back(self) -> None:
        for kept in self._kept:
            stretch = kept.stretch
            kept.piece.of(stretch.of(stretch.main)).index_copy_(kept.dim, kept.index, kept.weights)
            for name, tensor in self._state_of(stretch.main).items():
                target = kept.piece.of(stretch.of(tensor))
                if name in kept.state:
                    target.index_copy_(kept.dim, kept.index, kept.state[name])
                else:  # the step that makes the state: what took no part in it has no history
                    target.index_fill_(kept.dim, kept.index, 0)
        self._kept.clear()

    def _state_of(self, main: Tensor) -> dict[str, Tensor]:
        return state_of(self._optimizer, main)


def state_of(optimizer: torch.optim.Optimizer, main: Tensor) -> dict[str, Tensor]:
    """Optimizer state of ``main`` with a value for each entry: the moments, not the step count."""
    state = optimizer.state
    if main not in state:
        return {}
    return {name: v for name, v in state[main].items() if isinstance(v, Tensor) and v.shape == main.shape and v.dim()}
