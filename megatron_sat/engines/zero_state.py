"""What a DeepSpeedEngine puts into a checkpoint and takes back, in megatron.core's distributed format.

The model lies under plain Megatron's keys, so a checkpoint opens in Megatron, and converts. Beside it the optimizer's
state, parameter by parameter and in the parameters' shapes, whatever ZeRO cut it into: so stage, number of replicas
and tensor parallelism may change between saving and loading, and no pickle of DeepSpeed's is ever read. Each
parameter's state is put together on one replica, its owner, and written from there; loading goes the same way back.
So a rank holds about as much more as ZeRO left it, never the whole state.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from torch import Tensor

from megatron_sat.engines.optim import Groups
from megatron_sat.engines.stretch import Find
from megatron_sat.shards import whole_shape

KIND = "DeepSpeed's"
MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"
"""The fp32 copies of 16-bit weights, under the name that Megatron-LM gives them."""

Places = Mapping[int, ShardedTensor | ShardedTensorFactory]
"""By a parameter's number, where its model tensor goes."""


def places_of(model: Mapping[str, Any], *, parameters: Sequence[torch.nn.Parameter]) -> Places:
    """Where each parameter goes. model: a module's sharded state, while it still names the parameters themselves."""
    return get_param_id_to_sharded_param_map(model, iter(parameters))


def detach(state: Any) -> None:
    """Let a sharded state keep the values that its parameters have now, whatever becomes of the parameters."""
    if isinstance(state, ShardedTensor | ShardedTensorFactory):
        if isinstance(state.data, Tensor):
            state.data = state.data.detach()
    elif isinstance(state, Mapping | list):
        for value in state.values() if isinstance(state, Mapping) else state:
            detach(value)


class OptimizerState:
    """The state of one Adam whose parameters lie in stretches."""

    def __init__(
        self,
        adam: torch.optim.Optimizer,
        *,
        parameters: Sequence[torch.nn.Parameter],
        find: Find,
        replicas: dist.ProcessGroup,
        replicated: bool,
    ) -> None:
        """parameters: the trainable ones, in an order that all ranks share. replicated: every replica has all of it."""
        self._adam, self._find = adam, find
        self._parameters = parameters
        self._replicas, self._replicated = replicas, replicated
        self._owners = _spread([whole_shape(p).numel() for p in parameters], over=dist.get_world_size(replicas))
        self.names = MOMENTS if all(p.dtype == torch.float32 for p in parameters) else (*MOMENTS, MAIN)

    @property
    def groups(self) -> Groups:
        """The parameter groups without their parameters: plain values."""
        plain = (bool, int, float, str)
        return [
            {key: value for key, value in group.items() if isinstance(value, plain)}
            for group in self._adam.param_groups
        ]

    def describe(self, places: Places, *, is_loading: bool) -> dict[str, Any]:
        """The whole state for dist_checkpointing; collective. Tensors only on their owners."""
        tensors: dict[int, dict[str, Any]] = {}
        for number, name, mine in self._each():
            values = self._collect(number, name=name) if not is_loading else self._empty(number) if mine else None
            if values is not None:
                place = make_sharded_optimizer_tensor(places[number], values, prefix=f"optimizer.state.{name}")
                tensors.setdefault(number, {})[name] = replace(place, replica_id=_only(place.replica_id))
        return {
            "engine": KIND,
            "step": self._step,
            "groups": self.groups,
            "copies": MAIN in self.names,
            "state": tensors,
        }

    def take_back(self, saved: Mapping[str, Any]) -> None:
        """Put a loaded state into place; collective."""
        tensors = saved.get("state", {})
        for number, name, mine in self._each():
            values = tensors[number][name].to(torch.float32) if mine else None
            self._spread_out(number, name=name, values=values)
        for main in self._mains():
            state = self._state_of(main)
            if isinstance(state["step"], Tensor):
                state["step"].fill_(float(saved["step"]))
            else:
                state["step"] = int(saved["step"])

    def copy_weights(self) -> None:
        """Make the fp32 copies anew from the model's weights, which must be whole."""
        for parameter in self._parameters:
            stretch = self._find(parameter)
            if stretch is not None and stretch.main is not parameter:
                end = stretch.start + stretch.length
                stretch.of(stretch.main).copy_(parameter.detach().reshape(-1)[stretch.start : end])

    # -- inside

    def _each(self) -> Iterator[tuple[int, str, bool]]:
        """(number of a parameter, name of a tensor of its state, whether this rank owns it)."""
        rank = dist.get_rank(self._replicas)
        for number in range(len(self._parameters)):
            for name in self.names:
                yield number, name, self._owners[number] == rank

    def _mains(self) -> list[Tensor]:
        found = [self._find(parameter) for parameter in self._parameters]
        return list({id(s.main): s.main for s in found if s is not None}.values())

    @property
    def _step(self) -> int:
        steps = {int(state["step"]) for state in self._adam.state.values() if "step" in state}
        assert len(steps) <= 1, f"all parameters are updated together, got steps {steps}"
        return steps.pop() if steps else 0

    def _state_of(self, main: Tensor) -> dict[str, Any]:
        """Adam's state of one tensor, made as Adam's first step would where there is none."""
        state = self._adam.state[main]
        if not state:
            fused = any(group.get("fused") for group in self._adam.param_groups)
            # DeepSpeed's Adam for the host counts in a plain number
            of_torch = isinstance(self._adam, torch.optim.Adam | torch.optim.AdamW)
            state["step"] = torch.tensor(0.0, device=main.device if fused else "cpu") if of_torch else 0
            state |= {name: torch.zeros_like(main.detach()) for name in MOMENTS}
        return state

    def _tensor(self, main: Tensor, *, name: str) -> Tensor:
        return main if name == MAIN else self._state_of(main)[name]

    def _empty(self, number: int) -> Tensor:
        return torch.zeros(whole_shape(self._parameters[number]), device=self._parameters[number].device)

    def _collect(self, number: int, *, name: str) -> Tensor | None:
        """The whole tensor on its owner; None elsewhere."""
        mine = self._owners[number] == dist.get_rank(self._replicas)
        if self._replicated and not mine:
            return None
        whole = self._empty(number)
        stretch = self._find(self._parameters[number])
        if stretch is not None:
            part = stretch.of(self._tensor(stretch.main, name=name))
            whole.view(-1)[stretch.start : stretch.start + stretch.length] = part.to(whole.device)
        if not self._replicated:  # elsewhere zeros
            dist.reduce(whole, dst=self._rank_of(number), group=self._replicas)
        return whole if mine else None

    def _spread_out(self, number: int, *, name: str, values: Tensor | None) -> None:
        """From the owner, who has values, to every replica's stretch."""
        whole = (self._empty(number) if values is None else values.to(self._parameters[number].device)).contiguous()
        dist.broadcast(whole, src=self._rank_of(number), group=self._replicas)
        stretch = self._find(self._parameters[number])
        if stretch is not None:
            part = whole.view(-1)[stretch.start : stretch.start + stretch.length]
            stretch.of(self._tensor(stretch.main, name=name)).copy_(part)

    def _rank_of(self, number: int) -> int:
        return dist.get_global_rank(self._replicas, self._owners[number])


def _only(replica: Any) -> Any:
    """The replica id of a tensor that one data-parallel rank alone has."""
    return (*replica[:-1], 0) if isinstance(replica, tuple) else 0


def _spread(sizes: Sequence[int], *, over: int) -> list[int]:
    """An owner for each size, so that all have about the same."""
    load = [0] * over
    owners = []
    for size in sizes:
        owner = load.index(min(load))
        load[owner] += size
        owners.append(owner)
    return owners
