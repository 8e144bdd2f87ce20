"""Which optional libraries this process can use: flash-attn, Transformer Engine, apex. None is ever required.
 The rooms that have a fast path ask here for its entry point and get None where they must do without. A
library counts only where a GPU is present; one that is installed but cannot be imported is reported once and
left aside.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from megatron_sat.log import warn_once

Kernel = Callable[..., Any]

FLASH_ATTENTION_DTYPES = (torch.float16, torch.bfloat16)
_FIRST_FLASH_ATTENTION = (2, 1)
"""Before 2.1 a causal mask over unequal lengths was aligned to the upper left corner, not the lower right."""


def flash_attention(*, cuda: bool) -> Kernel | None:
    """flash-attn's ``flash_attn_func``: [b, s, n, d], grouped queries, causal to the lower right."""
    library = _library("flash_attn", cuda=cuda)
    # flash-attn 4 alone leaves a package of that name without this function
    kernel: Kernel | None = getattr(library, "flash_attn_func", None)
    if library is None or kernel is None or _release(library) < _FIRST_FLASH_ATTENTION:
        return None
    return kernel


def flash_attention_varlen(*, cuda: bool) -> Kernel | None:
    """The same of sequences laid end to end: flash-attn's ``flash_attn_varlen_func``, [t, n, d]."""
    if flash_attention(cuda=cuda) is None:
        return None
    kernel: Kernel | None = getattr(_library("flash_attn", cuda=cuda), "flash_attn_varlen_func", None)
    return kernel


def torch_attention_varlen(*, cuda: bool) -> Kernel | None:
    """torch's own ``varlen_attn``, [t, n, d]; where it takes a window and grouped queries (2.13), from Ampere on."""
    name = "torch.nn.attention.varlen"
    if not cuda or importlib.util.find_spec(name) is None:
        return None
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
        return None
    kernel: Kernel = importlib.import_module(name).varlen_attn
    return kernel if {"window_size", "enable_gqa"} <= inspect.signature(kernel).parameters.keys() else None


def transformer_engine_norm(*, cuda: bool, kind: str = "RMSNorm") -> type[torch.nn.Module] | None:
    """Transformer Engine's class. kind: RMSNorm or LayerNorm."""
    library = _library("transformer_engine.pytorch", cuda=cuda)
    found: type[torch.nn.Module] | None = getattr(library, kind, None)
    return found


def apex_rms_norm(*, cuda: bool) -> Kernel | None:
    """apex' ``fused_rms_norm_affine(x, weight, shape, eps, memory_efficient)``, if built with it."""
    return _apex_norm("fused_rms_norm_affine", cuda=cuda)


def apex_layer_norm(*, cuda: bool) -> Kernel | None:
    """apex' ``fused_layer_norm_affine(x, weight, bias, shape, eps, memory_efficient)``, if built with it."""
    return _apex_norm("fused_layer_norm_affine", cuda=cuda)


def _apex_norm(name: str, *, cuda: bool) -> Kernel | None:
    if _library("fused_layer_norm_cuda", cuda=cuda) is None:
        return None
    kernel: Kernel | None = getattr(_library("apex.normalization.fused_layer_norm", cuda=cuda), name, None)
    return kernel


def fused_gradient_accumulation(*, cuda: bool) -> bool:
    """Whether Megatron's linear layers can add weight gradients to the main one in the kernel (of apex)."""
    return _library("fused_weight_gradient_mlp_cuda", cuda=cuda) is not None


def in_use(*, cuda: bool, dtype: torch.dtype, gradient_accumulation_fusion: bool, optimizer: str) -> str:
    """One line for the start of a run: what computes attention, norm, optimizer step, gradient accumulation.

    dtype: the activations'. gradient_accumulation_fusion: the model config's. optimizer: the engine's word on
    its own.
    """
    flash = flash_attention(cuda=cuda) if dtype in FLASH_ATTENTION_DTYPES else None
    if transformer_engine_norm(cuda=cuda) is not None:
        norm = _named("transformer_engine", "Transformer Engine")
    elif apex_rms_norm(cuda=cuda) is not None:
        norm = _named("apex", "apex")
    else:
        norm = f"torch {torch.__version__}"
    fused = gradient_accumulation_fusion and fused_gradient_accumulation(cuda=cuda)
    attention = f"torch {torch.__version__} SDPA" if flash is None else _named("flash_attn", "flash-attn")
    how = "not fused" if not gradient_accumulation_fusion else "fused (apex)" if fused else "fused (torch)"
    parts = [
        f"attention: {attention}",
        f"norm: {norm}",
        optimizer,
        f"gradient accumulation: {how}",
    ]
    return "; ".join(parts)


def _library(name: str, *, cuda: bool) -> ModuleType | None:
    """The imported module ``name``; None without a GPU, not installed, or (after a warning) broken."""
    top = name.partition(".")[0]
    if not cuda or not _is_installed(top):
        return None
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared object that ctypes cannot open
        warn_once(
            f"{top} is installed but {name} cannot be imported ({error}); going on without it, "
            "reinstall it for this torch and CUDA to use it"
        )
        return None


def _is_installed(top: str) -> bool:
    try:
        return importlib.util.find_spec(top) is not None
    except ValueError:  # a module without __spec__ is in sys.modules: it was put there, so it is there
        return True


def _release(library: ModuleType) -> tuple[int, int]:
    """(major, minor) of a library's version."""
    major, minor, *_ = library.__version__.split(".")
    return int(major), int(minor)


def _named(module: str, name: str) -> str:
    version = getattr(importlib.import_module(module), "__version__", "")
    return f"{name} {version}".rstrip()
