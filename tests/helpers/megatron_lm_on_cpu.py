"""Runs a Megatron-LM training script without a GPU: what `cpu.install` does, and what only its trainer asks.

    torchrun ... megatron_lm_on_cpu.py SCRIPT.py ARGUMENTS...

megatron.core needs little (see megatron_sat/cpu.py); megatron.training also asks for device properties, memory figures,
streams and events, and refuses to start without CUDA unless told. That is for tests only, so it lives here.
"""

import collections
import contextlib
import functools
import runpy
import sys
from types import SimpleNamespace
from typing import Any

import torch

from megatron_sat import cpu

cpu.install()

import megatron.core.datasets.utils as dataset_utils  # noqa: E402
import megatron.training.training as training  # noqa: E402


class _Nothing:
    """Stands in for a stream or an event: any call does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *args: object) -> None: ...

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def stand_in_for_the_trainer() -> None:
    """The names of torch.cuda that megatron.training uses beyond those of megatron.core."""
    cuda: Any = torch.cuda
    cuda.device_count = lambda: 1
    cuda.get_device_properties = lambda *args: SimpleNamespace(major=0, minor=0, name="cpu")
    cuda.get_device_capability = lambda *args: (0, 0)
    cuda.Stream = cuda.Event = _Nothing
    cuda.current_stream = cuda.default_stream = lambda *args: _Nothing()
    cuda.stream = lambda stream: contextlib.nullcontext()
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_stream"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.memory_stats = lambda *args: collections.defaultdict(int)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *args: None)
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign,assignment]


def main() -> None:
    """Patch, then run the script as if it had been started itself."""
    stand_in_for_the_trainer()
    dataset_utils.compile_helpers = lambda: None  # the wheel has the helper built and no Makefile: it would exit
    training.set_jit_fusion_options = lambda *args, **kwargs: None  # warms fusions up on the GPU
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
