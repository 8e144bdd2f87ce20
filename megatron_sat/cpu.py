"""What lets megatron.core run on a machine without a GPU; with one, nothing in here does anything.
 megatron.core writes ``device="cuda"`` literally, asks ``torch.cuda`` for devices, streams and random state,
and recognises its parameters by the type name ``torch.cuda.FloatTensor``. `install` makes those few names
mean the CPU. `STAND_INS` is the whole list, each entry with its reason; nothing outside it is replaced.
 Call `install` before anything of megatron is imported: ``megatron.core.jit`` binds ``torch.compile`` at
import.
"""

import functools
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._device

CPU = torch.device("cpu")
_FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like")
_installed = False


def _is_cuda(device: Any) -> bool:
    return getattr(device, "type", str(device)).startswith("cuda")


def _compile() -> None:
    def compile_nothing(function: Any = None, **_: Any) -> Any:
        return function if function is not None else (lambda f: f)

    torch.compile = compile_nothing  # type: ignore[assignment]


def _devices() -> None:
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.set_device = lambda device: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign,assignment]
    # torch remembers its factories, for ``with torch.device("meta")``, when first asked: before they are wrapped
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def made_on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return made_on_cpu


def _streams() -> None:
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(  # type: ignore[assignment,return-value]
        wait_stream=lambda other: None, synchronize=lambda: None
    )


def _random_state() -> None:
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda._lazy_call = lambda function, **_: function()
    cuda.default_generators = type("_Any", (), {"__getitem__": lambda self, _: torch.default_generator})()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    # fork() of the tracker warns each time that the CPU's state changed inside it: here that is its purpose
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def _type_names() -> None:
    true_type = torch.Tensor.type

    def type_seen_by_megatron(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = true_type(self, *args, **kwargs)
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and asker.startswith("megatron."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_seen_by_megatron  # type: ignore[method-assign,assignment]


STAND_INS: tuple[tuple[str, str, Callable[[], None]], ...] = (
    (
        "torch.compile",
        "megatron.core.jit compiles at import; on a CPU that needs g++ and seconds a process",
        _compile,
    ),
    (
        "torch.cuda.current_device/set_device, Tensor.cuda, Module.cuda, device='cuda' and pin_memory in "
        + "/".join(_FACTORIES),
        "megatron.core names the device literally (RoPE under CP, gradient buffers, norms of the optimizer)",
        _devices,
    ),
    (
        "torch.cuda.synchronize/current_stream",
        "pipeline p2p and DDP wait for streams that a CPU has not",
        _streams,
    ),
    (
        "torch.cuda random state",
        "tensor_parallel.random keeps its tracker on the GPU's generator; the CPU's generator plays it",
        _random_state,
    ),
    (
        "Tensor.type() asked by megatron",
        "clip_grads, optimizer and distrib_optimizer accept only 'torch.cuda.*Tensor' parameters",
        _type_names,
    ),
)
"""(what is replaced, why, how). With a GPU none of it is."""


def install() -> bool:
    """Make megatron.core importable and trainable on a CPU. Returns whether stand-ins are in force.

    A no-op where CUDA is available, and the second time. Checked against megatron-core 0.16.1 and 0.19.2.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        for _, _, stand_in in STAND_INS:
            stand_in()
        _installed = True
    return True


def explain() -> list[str]:
    """One line a stand-in, for the log: what is replaced and why."""
    return [f"{what}: {why}" for what, why, _ in STAND_INS]
