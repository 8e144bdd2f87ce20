"""Entries that sit an update out: weights and optimizer state bit-identical before and after it (the paper's eq. 2).

A zero gradient is not enough: momentum and weight decay still move an entry. So the held entries of the
weights that the inner torch optimizer steps on, and of every state tensor beside them, are copied before its
step and written back after it. This costs one transient copy of what is held, and nothing where nothing is.

Works on megatron.core's three wrappers of a torch optimizer: FP32Optimizer steps on the model's parameters,
Float16OptimizerWithFloat16Params on fp32 copies, DistributedOptimizer on this rank's flat range of a parameter or of
its fp32 copy. The model's own 16-bit weights follow, being rounded from copies that did not change.
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
        _Holder(wrapper, entries).attach()


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
class Piece:
    """A rectangle of a parameter [rows, columns] that lies contiguously in a flat range of it."""

    start: int
    """First element, counted from the start of the range."""
    rows: tuple[int, int]
    """First row and the one after the last."""
    columns: tuple[int, int]
    """First column and the one after the last."""


def pieces(start: int, end: int, *, columns: int) -> list[Piece]:
    """Cut the flat range [start, end) of a row-major [., columns] parameter into at most three rectangles:
    the rest of a row, whole rows, the beginning of a row."""
    cut: list[Piece] = []
    at = start
    while at < end:
        row, column = divmod(at, columns)
        if column == 0 and end - at >= columns:
            last = end // columns
            cut.append(Piece(at - start, (row, last), (0, columns)))
            at = last * columns
        else:
            stop = min(end, (row + 1) * columns)
            cut.append(Piece(at - start, (row, row + 1), (column, column + stop - at)))
            at = stop
    return cut


@dataclass(frozen=True)
class _Kept:
    """Copies of the held entries of one rectangle: of the weights, and of each state tensor there is."""

    main: Tensor
    piece: Piece
    dim: int
    index: Tensor
    weights: Tensor
    state: dict[str, Tensor]


class _Holder:
    """The two hooks on one inner torch optimizer, and what the first passes to the second."""

    def __init__(self, wrapper: MegatronOptimizer, entries: Callable[[], Iterable[Held]]) -> None:
        self._wrapper = wrapper
        self._entries = entries
        self._own = {id(main) for group in wrapper.optimizer.param_groups for main in group["params"]}
        self._kept: list[_Kept] = []

    def attach(self) -> None:
        self._wrapper.optimizer.register_step_pre_hook(lambda *_: self._copy())
        self._wrapper.optimizer.register_step_post_hook(lambda *_: self._write_back())

    @torch.no_grad()
    def _copy(self) -> None:
        for parameter, dim, index in self._entries():
            main, start = _stepped_on(self._wrapper, parameter=parameter)
            if main is None or id(main) not in self._own:
                continue
            rows = parameter.shape[0]
            columns = parameter.numel() // rows
            index = index.to(main.device)
            if index.dtype == torch.bool:
                index = index.nonzero().flatten()
            for piece in pieces(start, start + main.numel(), columns=columns):
                first, last = (piece.rows, piece.columns)[dim]
                inside = index[(index >= first) & (index < last)] - first
                if inside.numel():
                    self._kept.append(self._copy_piece(main, piece=piece, dim=dim, index=inside))

    def _copy_piece(self, main: Tensor, *, piece: Piece, dim: int, index: Tensor) -> _Kept:
        return _Kept(
            main=main,
            piece=piece,
            dim=dim,
            index=index,
            weights=_view(main, piece=piece).index_select(dim, index),
            state={
                name: _view(tensor, piece=piece).index_select(dim, index)
                for name, tensor in self._state_of(main).items()
            },
        )

    @torch.no_grad()
    def _write_back(self) -> None:
        for kept in self._kept:
            _view(kept.main, piece=kept.piece).index_copy_(kept.dim, kept.index, kept.weights)
            for name, tensor in self._state_of(kept.main).items():
                target = _view(tensor, piece=kept.piece)
                if name in kept.state:
                    target.index_copy_(kept.dim, kept.index, kept.state[name])
                else:  # the step that makes the state: what took no part in it has no history
                    target.index_fill_(kept.dim, kept.index, 0)
        self._kept.clear()

    def _state_of(self, main: Tensor) -> dict[str, Tensor]:
        """Optimizer state with a value for each entry: the moments, not the step count."""
        state = self._wrapper.optimizer.state
        if main not in state:
            return {}
        return {
            name: v for name, v in state[main].items() if isinstance(v, Tensor) and v.shape == main.shape and v.dim()
        }


def _stepped_on(wrapper: MegatronOptimizer, *, parameter: torch.nn.Parameter) -> tuple[Tensor | None, int]:
    """The tensor that the inner optimizer steps on for `parameter`, and the first element of it that it stands for.

    None where this rank's shard of the optimizer has nothing of it.
    """
    if isinstance(wrapper, DistributedOptimizer):
        if parameter not in wrapper.model_param_group_index_map:
            return None, 0
        group, order = wrapper.model_param_group_index_map[parameter]
        main = wrapper.optimizer.param_groups[group]["params"][order]
        return main, wrapper._get_model_param_range_map(parameter)["param"].start
    if isinstance(wrapper, Float16OptimizerWithFloat16Params) and parameter.dtype != torch.float32:
        return parameter.main_param, 0  # type: ignore[attr-defined]
    return parameter, 0


def _view(tensor: Tensor, *, piece: Piece) -> Tensor:
    """The piece of a contiguous tensor, as [rows, columns]."""
    rows = piece.rows[1] - piece.rows[0]
    columns = piece.columns[1] - piece.columns[0]
    return tensor.detach().view(-1)[piece.start : piece.start + rows * columns].view(rows, columns)
