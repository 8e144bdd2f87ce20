"""A transformer layer recorded once per shape and replayed: the host launches a few graphs instead of hundred kernels.

At rate .5 a layer of 7B keeps the device busy for 3.5 ms a micro-batch, and launching it takes the host 5 (H100). So
the two halves of a layer, attention and MLP, each with norm and residual, are recorded forward and backward the second
time a shape comes by (the first is eager: it chooses, packs, and lets libraries warm up), and replayed from then on.
What changes from step to step is what lies in the packed weights, not where they lie, so a recording serves a whole
rung. A step's choice is recorded too, between the halves (`choosing`). Gradients of weights are added up inside;
Megatron's hooks on parameters run outside, as after any backward.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_sat.layers.choosing import RecordedChoice
from megatron_sat.layers.passable import PassableLayer
from megatron_sat.layers.recording import Recorder, Recording, fill
from megatron_sat.layers.sparse import SparsePair

Form = tuple[torch.Size, torch.dtype, int]
"""Shape and type of the hidden states, units kept: what a recording is made for."""


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """One recording, and what it is good for."""

    form: Form
    key: tuple[Any, ...]
    bound: Mapping[str, Any]
    recording: Recording
    parameters: tuple[Parameter, ...]
    """The half's."""
    fused: Mapping[Parameter, Any]
    """Weights whose gradient is added up inside, and their linear layer."""


class Half:
    """Attention or MLP of one layer, with norm and residual: eager where it must be, else replayed."""

    def __init__(
        self,
        modules: Iterable[Module],
        *,
        pair: SparsePair,
        forward: Callable[..., Tensor],
        recorder: Recorder,
        place: int,
    ) -> None:
        """modules: those with the half's parameters. forward: (hidden states [s, b, h], bound by name) -> [s, b, h].

        place: among the model's halves, in the order of a forward.
        """
        self._modules = [inner for module in modules for inner in module.modules()]
        self._parameters = [p for module in self._modules for p in module._parameters.values() if p is not None]
        self._pair, self._forward, self._recorder, self._place = pair, forward, recorder, place
        self._seen: tuple[Any, ...] | None = None
        self._kept: _Kept | None = None
        self._choice: RecordedChoice | None = None

    def __call__(self, hidden: Tensor, bound: Mapping[str, Any]) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        if not hidden.requires_grad or not all(parameter.requires_grad for parameter in self._parameters):
            return self._forward(hidden, **bound)
        form = hidden.shape, hidden.dtype, self._pair.units_to_keep
        if self._kept is not None and self._kept.form != form:
            self._drop()  # before anything of the new form takes memory
        if not self._pair.ready_for_replay() and not self._chosen(hidden, bound, form=form):
            output = self._forward(hidden, **bound)
            self._seen = self._key(form) if self._pair.ready_for_replay() else None
            return output
        key = self._key(form)
        if key != self._seen:
            self._drop()
            self._seen = key
            return self._forward(hidden, **bound)
        if self._kept is None or self._kept.key != key or not _same(self._kept.bound, bound):
            self._kept = None  # its memory is free before
            self._kept = self._record(hidden, form=form, key=key, bound=bound)
        return _Replay.apply(self._kept, self._pair, hidden, *self._kept.parameters)

    def _drop(self) -> None:
        self._kept = self._choice = None

    def _key(self, form: Form) -> tuple[Any, ...]:
        """What must be alike for a recording to serve the next call of a pair that is ready for replay."""
        pair = self._pair
        packs = [linear.pack_for(pair.packing) for linear in pair.linear_pair()]
        where = [None if pack is None else (pack.buffer.data_ptr(), pack.buffer.shape) for pack in packs]
        return (*form, *where, 1.0 if pair.selector is None else pair.selector.output_scale)

    def _chosen(self, hidden: Tensor, bound: Mapping[str, Any], *, form: Form) -> bool:
        """Make the step's choice by replay; False where the forward has to make it."""
        if self._seen is None or self._seen[: len(form)] != form or not self._pair.can_choose_by_replay():
            return False
        if self._choice is None or not _same(self._choice.bound, bound):
            self._choice = RecordedChoice(
                self._pair, hidden, forward=self._forward, bound=bound, recorder=self._recorder, place=self._place
            )
        self._choice(hidden)
        return self._pair.ready_for_replay()

    def _record(self, hidden: Tensor, *, form: Form, key: tuple[Any, ...], bound: Mapping[str, Any]) -> _Kept:
        """Record this call. Nothing is computed yet."""
        pair = self._pair
        linears = {linear.weight: linear for linear in pair.linear_pair()}
        standing_in = {parameter: _alias(parameter) for parameter in self._parameters}
        found = {weight: linear.packed_leaf(pair.packing) for weight, linear in linears.items()}
        packed = {linears[weight]: leaf for weight, leaf in found.items() if leaf is not None}
        leaves: list[Tensor] = [
            packed[linears[parameter]] if found.get(parameter) is not None else alias
            for parameter, alias in standing_in.items()
        ]

        def compute(inputs: Tensor) -> Tensor:
            with _replaced(self._modules, standing_in), _lent(packed):
                return self._forward(inputs, **bound)

        recording = self._recorder.record(compute, hidden, leaves, place=self._place)
        return _Kept(
            form=form, key=key, bound=bound, recording=recording, parameters=tuple(standing_in), fused=linears
        )


def _same(kept: Mapping[str, Any], bound: Mapping[str, Any]) -> bool:
    """Whether the very same objects are bound."""
    return kept.keys() == bound.keys() and all(bound[name] is kept[name] for name in bound)


class GraphedLayer(PassableLayer):
    """Megatron's layer; with halves that were given a recorder, replayed where nothing but the numbers changed."""

    _halves: tuple[Half, Half] | None = None
    """None: always eager."""

    def record_with(self, recorder: Recorder, *, place: int) -> None:
        """Let both halves be recorded from now on. place: among the model's layers."""
        attention, mlp = self.self_attention, self.mlp
        if not isinstance(attention, SparsePair) or not isinstance(mlp, SparsePair):
            return
        of_mlp = [self.pre_mlp_layernorm, mlp]
        of_attention = [child for child in self.children() if all(child is not module for module in of_mlp)]
        # not modules: a tuple, so that they are no children of the layer
        self._halves = (
            Half(of_attention, pair=attention, forward=self._attend, recorder=recorder, place=2 * place),
            Half(of_mlp, pair=mlp, forward=self._feed_forward, recorder=recorder, place=2 * place + 1),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's: (hidden states [s, b, h], context)."""
        if self._halves is None or args or not self.training or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        bound = dict(kwargs)
        hidden, (attention, mlp) = bound.pop("hidden_states"), self._halves
        return mlp(attention(hidden, bound), {"padding_mask": bound.get("padding_mask")}), bound.get("context")

    # what Megatron's forward calls one after the other
    def _attend(self, hidden: Tensor, **bound: Any) -> Tensor:
        output: Tensor = self._forward_attention(hidden_states=hidden, **bound)[0]
        return output

    def _feed_forward(self, hidden: Tensor, **bound: Any) -> Tensor:
        output: Tensor = self._forward_mlp(hidden, **bound)
        return output


def _alias(parameter: Parameter) -> Parameter:
    """The same memory as a leaf of its own: DDP holds the parameter's gradient node, and that is of another stream."""
    alias: Any = Parameter(parameter.detach())
    if hasattr(parameter, "main_grad"):
        alias.main_grad, alias.grad_added_to_main_grad = parameter.main_grad, False
    return alias


@contextmanager
def _replaced(modules: Sequence[Module], standing_in: Mapping[Parameter, Parameter]) -> Iterator[None]:
    """For a while, the modules have other parameters."""
    places = [
        (module, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    for module, name, parameter in places:
        module._parameters[name] = standing_in[parameter]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


@contextmanager
def _lent(packed: Mapping[Any, Tensor]) -> Iterator[None]:
    """For a while, linear layers compute with these packed weights."""
    for linear, leaf in packed.items():
        linear.lent = leaf
    try:
        yield
    finally:
        for linear in packed:
            linear.lent = None


class _Replay(torch.autograd.Function):
    """(hidden states, the half's parameters) -> hidden states, by a recording."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, pair: SparsePair, hidden: Tensor, *parameters: Parameter) -> Tensor:
        ctx.kept, ctx.pair = kept, pair
        fill(kept.recording.inputs.detach(), hidden)
        kept.recording.forward()
        return kept.recording.output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        kept: _Kept = ctx.kept
        kept.recording.output_gradient.copy_(grads[0])
        kept.recording.backward()
        of_inputs, *of_leaves = kept.recording.gradients
        found: list[Any] = []
        for parameter, gradient in zip(kept.parameters, of_leaves, strict=True):
            if parameter in kept.fused:
                kept.fused[parameter].gradient_added(ctx.pair.packing)
                gradient = torch.empty_like(parameter)  # never read: hooks run only where a gradient arrives
            found.append(gradient)
        return None, None, of_inputs, *found


def record_layers(chunks: Iterable[Module], *, recorder: Recorder) -> None:
    """Let every layer of the model chunks be recorded."""
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, GraphedLayer)]
    for place, layer in enumerate(layers):
        layer.record_with(recorder, place=place)
