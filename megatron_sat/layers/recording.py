"""Launches recorded once and replayed: CUDA graphs, and a twin that computes anew at each replay.

A `Recorder` makes recordings of one model. They share memory: what one uses only while it runs, a later one may keep.
So replays must keep the order of recording (a layer's forward before the next layer's, backwards the other way round),
and each says its place in that order; what must outlive a step's replays is copied out by whoever records.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

CAPTURE_ERRORS = "thread_local"
Compute = Callable[[Tensor], Tensor]
"""A forward with everything but the hidden states bound."""
Launch = Callable[[], None]
"""Launches kernels, on tensors that stay where they are."""


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


class Recorder(Protocol):
    """Makes recordings."""

    def record(self, compute: Compute, hidden: Tensor, leaves: Sequence[Tensor], *, place: int) -> Recording:
        """A recording of ``compute`` for tensors like ``hidden``, with gradients of ``leaves``. Nothing is computed.

        Its inputs lie where ``hidden`` lies: what another recording puts out need not be copied. place: in the order
        of a forward.
        """
        ...

    def record_launch(self, launch: Launch, *, place: int) -> Launch:
        """What launches the kernels of ``launch`` again; they have not run. No gradients, and nothing is kept."""
        ...


def fill(place: Tensor, values: Tensor) -> None:
    """Copy ``values`` to a recording's ``place``, unless that is where they are."""
    if place.data_ptr() != values.data_ptr():
        place.copy_(values)


class _OnGpu:
    """Two CUDA graphs in one memory pool. Saved activations stay alive: what is recorded later may not take them."""

    def __init__(self, compute: Compute, hidden: Tensor, leaves: Sequence[Tensor], *, pool: Any, stream: Any) -> None:
        self.inputs, self.output_gradient = hidden.detach().requires_grad_(), torch.empty_like(hidden)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _beside(stream):
            self._recorded = _capture(self._forward, lambda: compute(self.inputs), pool=pool)
            self.gradients = _capture(self._backward, lambda: _gradients(self, leaves), pool=pool)
        self.output = self._recorded.detach()

    def forward(self) -> None:
        self._forward.replay()

    def backward(self) -> None:
        self._backward.replay()


@contextmanager
def _beside(stream: Any) -> Iterator[None]:
    """On another stream, which a capture must have, and without the collection of garbage: what that frees may wait
    for an event, which a capture must not."""
    stream.wait_stream(torch.cuda.current_stream())
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        if collects:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)


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
        self.inputs = hidden.detach().requires_grad_()
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
    """Of the inputs and the leaves. Megatron's fused product returns an empty gradient of the weight's size: let go."""
    of_inputs, *of_leaves = torch.autograd.grad(
        recording._recorded,
        [recording.inputs, *leaves],
        recording.output_gradient,
        retain_graph=True,
        allow_unused=True,
    )
    pairs = zip(leaves, of_leaves, strict=True)
    return [of_inputs, *(None if getattr(leaf, "grad_added_to_main_grad", False) else found for leaf, found in pairs)]


class SharedPool:
    """Memory that living recordings share. There is a new one where the old one cannot serve.

    That is where its last recording is gone, with which the allocator buries it; and for a recording whose place is
    before that of a living one: what it keeps for backward, the later one would overwrite in between.
    """

    def __init__(self, new_handle: Callable[[], Any]) -> None:
        self._new_handle = new_handle
        self._handle: Any = None
        self._living: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def handle(self, *, place: int) -> Any:
        """Of the pool to record into now."""
        if not self._living or max(self._living.values()) > place:
            self._handle = self._new_handle()
            self._living.clear()
        return self._handle

    def joined_by(self, recording: Any, *, place: int) -> None:
        """The recording holds graphs in this pool as long as it lives."""
        self._living[recording] = place


class GpuRecorder:
    """CUDA graphs in one pool of memory, recorded on one stream."""

    def __init__(self) -> None:
        self._pool, self._stream = SharedPool(_fresh_pool), torch.cuda.Stream()

    def record(self, compute: Compute, hidden: Tensor, leaves: Sequence[Tensor], *, place: int) -> Recording:
        recording = _OnGpu(compute, hidden, leaves, pool=self._pool.handle(place=place), stream=self._stream)
        self._pool.joined_by(recording, place=place)
        return recording

    def record_launch(self, launch: Launch, *, place: int) -> Launch:
        graph, pool = torch.cuda.CUDAGraph(), self._pool.handle(place=place)
        with _beside(self._stream):
            _capture(graph, launch, pool=pool)
        self._pool.joined_by(graph, place=place)
        return graph.replay


def _fresh_pool() -> Any:
    """A new pool. What the eager forwards left cached is given back first: a capture cannot ask for it."""
    torch.cuda.empty_cache()
    return torch.cuda.graph_pool_handle()


class RerunRecorder:
    """The slow twin, and the way to test without a GPU: every replay computes anew."""

    def record(self, compute: Compute, hidden: Tensor, leaves: Sequence[Tensor], *, place: int) -> Recording:
        del place  # nothing is shared
        return _Rerun(compute, hidden, leaves)

    def record_launch(self, launch: Launch, *, place: int) -> Launch:
        del place
        return launch
