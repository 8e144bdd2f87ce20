"""A transformer layer recorded once per shape and replayed: the host launches two graphs instead of hundred kernels.

At rate .5 a layer of 7B keeps the device busy for 3.5 ms a micro-batch, and launching it takes the host 5 (H100). So a
layer's forward and backward are recorded as CUDA graphs the second time a shape comes by (the first is eager: it
chooses, packs, and lets libraries warm up), and replayed from then on. What changes from step to step is what lies in
the packed weights, not where they lie, so a recording serves a whole rung. Gradients of weights are added up inside;
Megatron's hooks on parameters run outside, as after any backward. `RERUN` in the place of `record_on_gpu` computes
everything anew at each replay: the slow twin, and the way to test this without a GPU.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_sat.layers.sparse import SparsePair

CAPTURE_ERRORS = "thread_local"
Compute = Callable[[Tensor], Tensor]
"""A layer's forward with everything but the hidden states bound."""


class Recording(Protocol):
    """A forward and a backward on tensors that stay where they are."""

    inputs: Tensor
    """[s, b, h], to be filled before `forward`."""
    output: Tensor
    """[s, b, h], of `forward`."""
    output_gradient: Tensor
    """[s, b, h], to be filled before `backward`."""
    gradients: list[Tensor | None]
    """Of the inputs and of the leaves, after `backward`; None for a leaf whose gradient is added up elsewhere."""

    def forward(self) -> None: ...

    def backward(self) -> None: ...


Record = Callable[[Compute, Tensor, Sequence[Tensor]], Recording]
"""(compute, hidden states, leaves) -> a recording of that shape."""


class _OnGpu:
    """Two CUDA graphs in one memory pool. Saved activations stay alive: what is recorded later may not take them."""

    def __init__(self, compute: Compute, hidden: Tensor, leaves: Sequence[Tensor], *, pool: Any, stream: Any) -> None:
        self.inputs = torch.empty_like(hidden).requires_grad_()
        self.output_gradient = torch.empty_like(hidden)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        collects = gc.isenabled()
        gc.disable()  # what it frees may wait for an event, which a recording must not
        try:
            with torch.cuda.stream(stream):
                self._recorded = _capture(self._forward, lambda: compute(self.inputs), pool=pool)
                self.gradients = _capture(self._backward, lambda: _gradients(self, leaves), pool=pool)
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(stream)
        self.output = self._recorded.detach()

    def forward(self) -> None:
        self._forward.replay()

    def backward(self) -> None:
        self._backward.replay()


def _capture(graph: Any, launch: Callable[[], Any], *, pool: Any) -> Any:
    """What ``launch`` returns; its kernels are in the graph, and have not run."""
    graph.capture_begin(pool=pool, capture_error_mode=CAPTURE_ERRORS)
    try:
        found = launch()
    except BaseException:
        with suppress(RuntimeError):  # which says that something failed, not what
            graph.capture_end()
        raise
    graph.capture_end()
    return found


class _Rerun:
    """The twin: computes anew what a graph would replay."""

    def __init__(self, compute: Compute, hidden: Tensor, leaves: Sequence[Tensor]) -> None:
        self.inputs = torch.empty_like(hidden).requires_grad_()
        self.output, self.output_gradient = torch.empty_like(hidden), torch.empty_like(hidden)
        self.gradients: list[Tensor | None] = []
        self._compute, self._leaves = compute, leaves

    def forward(self) -> None:
        with torch.enable_grad():
            self._recorded = self._compute(self.inputs)
        self.output.copy_(self._recorded.detach())

    def backward(self) -> None:
        self.gradients = _gradients(self, self._leaves)


def _gradients(recording: Any, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    return list(
        torch.autograd.grad(
            recording._recorded,
            [recording.inputs, *leaves],
            recording.output_gradient,
            retain_graph=True,
            allow_unused=True,
        )
    )


class SharedPool:
    """Memory that living recordings share. The allocator buries a pool with its last graph: then there is a new one."""

    def __init__(self, new_handle: Callable[[], Any]) -> None:
        self._new_handle = new_handle
        self._handle: Any = None
        self._living: WeakSet[Any] = WeakSet()

    def handle(self) -> Any:
        """Of the pool to record into now."""
        if self._handle is None or not self._living:
            self._handle = self._new_handle()
        return self._handle

    def joined_by(self, recording: Any) -> None:
        """The recording holds graphs in this pool as long as it lives."""
        self._living.add(recording)


def record_on_gpu() -> Record:
    """Recordings of one model: they share a pool of memory and the stream they are recorded on."""
    pool, stream = SharedPool(torch.cuda.graph_pool_handle), torch.cuda.Stream()

    def record(compute: Compute, hidden: Tensor, leaves: Sequence[Tensor]) -> Recording:
        recording = _OnGpu(compute, hidden, leaves, pool=pool.handle(), stream=stream)
        pool.joined_by(recording)
        return recording

    return record


RERUN: Record = _Rerun


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """One recording, and what it is good for."""

    key: tuple[Any, ...]
    bound: dict[str, Any]
    recording: Recording
    parameters: tuple[Parameter, ...]
    """The layer's."""
    fused: dict[Parameter, Any]
    """Weights whose gradient is added up inside; their attention or MLP, and linear layer."""


class GraphedLayer(TransformerLayer):
    """Megatron's layer; with `record` set, replayed where nothing but the numbers changed."""

    record: Record | None = None
    """None: always eager."""
    _seen: tuple[Any, ...] | None = None
    _kept: _Kept | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's: (hidden states [s, b, h], context)."""
        if self.record is None or args or "hidden_states" not in kwargs:
            return super().forward(*args, **kwargs)
        bound = dict(kwargs)
        hidden = bound.pop("hidden_states")
        key, kept = self._key(hidden), self._kept
        if key is None or self._seen != key:
            if key is not None:
                self._kept = None  # eager once, and the memory of the last shape is free before
            output = super().forward(*args, **kwargs)
            self._seen = self._key(hidden) or self._seen  # an evaluation in between changes nothing
            return output
        if kept is None or kept.key != key or any(bound[name] is not kept.bound[name] for name in bound):
            kept = self._kept = self._recorded(hidden, key=key, bound=bound)
        return _Replay.apply(kept, hidden, *kept.parameters), bound.get("context")

    def _key(self, hidden: Tensor) -> tuple[Any, ...] | None:
        """What must be alike for a recording to serve this call; None where none may."""
        if not self.training or not torch.is_grad_enabled() or not hidden.requires_grad:
            return None
        if not all(parameter.requires_grad for parameter in self.parameters()):
            return None
        pairs = [module for module in (self.self_attention, self.mlp) if isinstance(module, SparsePair)]
        if len(pairs) < 2 or not all(pair.ready_for_replay() for pair in pairs):
            return None
        key: list[Any] = [hidden.shape, hidden.dtype]
        for pair in pairs:
            packs = [linear.pack_for(pair.packing) for linear in pair.linear_pair()]
            key += [None if pack is None else (pack.buffer.data_ptr(), pack.buffer.shape) for pack in packs]
            key.append(1.0 if pair.selector is None else pair.selector.output_scale)
        return tuple(key)

    def _recorded(self, hidden: Tensor, *, key: tuple[Any, ...], bound: dict[str, Any]) -> _Kept:
        """Record this call. Nothing is computed yet."""
        assert self.record is not None
        self._kept = None
        pairs = (self.self_attention, self.mlp)
        fused = {linear.weight: (pair, linear) for pair in pairs for linear in pair.linear_pair()}
        standing_in = {parameter: _alias(parameter) for parameter in self.parameters()}
        leaves: list[Tensor] = []
        for parameter, alias in standing_in.items():
            pair, linear = fused.get(parameter, (None, None))
            packed = None if linear is None else linear.lend(pair.packing)
            leaves.append(alias if packed is None else packed)

        def compute(inputs: Tensor) -> Tensor:
            with _replaced(self, standing_in), _lent([linear for _, linear in fused.values()]):
                output: Tensor = TransformerLayer.forward(self, hidden_states=inputs, **bound)[0]
            return output

        recording = self.record(compute, hidden, leaves)
        return _Kept(key=key, bound=bound, recording=recording, parameters=tuple(standing_in), fused=fused)


def _alias(parameter: Parameter) -> Parameter:
    """The same memory as a leaf of its own: DDP holds the parameter's gradient node, and that is of another stream."""
    alias: Any = Parameter(parameter.detach())
    if hasattr(parameter, "main_grad"):
        alias.main_grad, alias.grad_added_to_main_grad = parameter.main_grad, False
    return alias


@contextmanager
def _replaced(layer: Module, standing_in: Mapping[Parameter, Parameter]) -> Iterator[None]:
    """For a while, the layer's modules have other parameters."""
    places = [
        (module, name, parameter)
        for module in layer.modules()
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
def _lent(linears: Sequence[Any]) -> Iterator[None]:
    """For a while, packed weights are those of `lend`."""
    for linear in linears:
        linear.lent = True
    try:
        yield
    finally:
        for linear in linears:
            linear.lent = False


class _Replay(torch.autograd.Function):
    """(hidden states, the layer's parameters) -> hidden states, by a recording."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, hidden: Tensor, *parameters: Parameter) -> Tensor:
        ctx.kept = kept
        kept.recording.inputs.detach().copy_(hidden)
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
                pair, linear = kept.fused[parameter]
                linear.gradient_added(pair.packing)
                gradient = torch.empty_like(parameter)  # never read: hooks run only where a gradient arrives
            found.append(gradient)
        return None, of_inputs, *found


def record_layers(chunks: Iterable[Module], *, record: Record) -> int:
    """Let every layer of the model chunks be recorded; returns how many there are."""
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, GraphedLayer)]
    for layer in layers:
        layer.record = record
    return len(layers)
