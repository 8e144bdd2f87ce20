"""RMSNorm and LayerNorm that work under sequence parallelism (Megatron's local ones refuse it), fused where a library
can.

Under SP each TP rank normalises its part of the sequence, so the parameters' gradients are partial sums. The mark on
them is all that ``finalize_model_grads`` needs to add them over TP. Whichever class computes, a checkpoint holds one
``weight``, and for LayerNorm one ``bias``, and nothing else, so it moves between machines with and without the
libraries.
"""

from functools import cache
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Module

from megatron_sat.layers.available import Kernel, apex_layer_norm, apex_rms_norm, transformer_engine_norm


def _device(config: TransformerConfig) -> Any:
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()


class RMSNorm(torch.nn.RMSNorm):
    """[..., hidden_size] -> the same shape; statistics in fp32 whatever the input is.

    On a GPU training goes through `CompiledNorm`; evaluation, whose shapes have no end, through torch's kernel.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Further arguments (persist_layer_norm, name, ...) are meant for other implementations."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_device(config))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]. Returns the same shape."""
        if not (x.is_cuda and torch.is_grad_enabled()):
            return super().forward(x)
        normed: Tensor = CompiledNorm.apply(x, self.weight, self.eps)
        return normed


class LayerNorm(torch.nn.LayerNorm):
    """[..., hidden_size] -> the same shape, less its mean, over its deviation; statistics in fp32. torch's kernel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Further arguments (persist_layer_norm, name, ...) are meant for other implementations."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_device(config))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CompiledNorm(torch.autograd.Function):
    """x / rms(x) * weight, over the last dimension, in fp32; one kernel forward, two backward.

    x: [..., h]; weight: [h]. Keeps x and a number a row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _fast(_norm, x)(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        return *_fast(_norm_gradients, x)(grads[0], x, weight, scale), None


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype), scale


def _norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    normed, grad = x.float() * scale, grad.float()
    slope = grad * weight.float()
    of_x = scale * (slope - normed * (slope * normed).mean(-1, keepdim=True))
    return of_x.to(x.dtype), (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)


def _fast(function: Any, x: Tensor) -> Any:
    return _compiled(function) if x.is_cuda else function


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)


class ApexRMSNorm(RMSNorm):
    """The same by apex' kernel, which can save its output only (``memory_efficient_layer_norm``)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Raises ValueError where apex' kernel cannot be imported."""
        super().__init__(config, hidden_size, eps)
        self.fused = _insisted_on(apex_rms_norm(cuda=True), instead="RMSNorm")
        self.memory_efficient = config.memory_efficient_layer_norm

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]. Returns the same shape."""
        normed: Tensor = self.fused(x, self.weight, self.normalized_shape, self.eps, self.memory_efficient)
        return normed


class ApexLayerNorm(LayerNorm):
    """LayerNorm likewise."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Raises ValueError where apex' kernel cannot be imported."""
        super().__init__(config, hidden_size, eps)
        self.fused = _insisted_on(apex_layer_norm(cuda=True), instead="LayerNorm")
        self.memory_efficient = config.memory_efficient_layer_norm

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]. Returns the same shape."""
        normed: Tensor = self.fused(
            x, self.weight, self.bias, self.normalized_shape, self.eps, self.memory_efficient
        )
        return normed


def _insisted_on(kernel: Kernel | None, *, instead: str) -> Kernel:
    if kernel is None:
        raise ValueError(
            f"apex must be installed with its CUDA extensions for Apex{instead}, "
            f"fused_layer_norm_cuda cannot be imported; install apex with --cuda_ext, or use {instead}"
        )
    return kernel


def _transformer_engine_norm(fused: type[Module]) -> type[Module]:
    """Transformer Engine's class behind the arguments that Megatron builds norms with."""

    class TransformerEngineNorm(fused):  # type: ignore[misc,valid-type]
        """A norm by Transformer Engine; its fp8 state, empty for a norm, would be a checkpoint key."""

        get_extra_state = Module.get_extra_state
        set_extra_state = Module.set_extra_state

        def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
            super().__init__(
                hidden_size,
                eps=eps,
                sequence_parallel=config.sequence_parallel,
                params_dtype=config.params_dtype,
                device=_device(config),
            )

    return TransformerEngineNorm


def rms_norm(*, cuda: bool, memory_efficient: bool = False) -> type[Module]:
    """The RMSNorm for a layer specification: Transformer Engine's, apex' or torch's, the first to be had.

    memory_efficient: keep a norm's output, not its input, for backward; apex alone can do that.
    Raises ValueError where it is asked for and apex cannot be imported.
    """
    apex = ApexRMSNorm if apex_rms_norm(cuda=cuda) is not None else None
    fused = transformer_engine_norm(cuda=cuda, kind="RMSNorm")
    return _first_to_be_had(fused, apex, RMSNorm, memory_efficient=memory_efficient)


def layer_norm(*, cuda: bool, memory_efficient: bool = False) -> type[Module]:
    """The LayerNorm likewise."""
    apex = ApexLayerNorm if apex_layer_norm(cuda=cuda) is not None else None
    fused = transformer_engine_norm(cuda=cuda, kind="LayerNorm")
    return _first_to_be_had(fused, apex, LayerNorm, memory_efficient=memory_efficient)


def _first_to_be_had(
    fused: type[Module] | None, apex: type[Module] | None, plain: type[Module], *, memory_efficient: bool
) -> type[Module]:
    if memory_efficient:
        if apex is None:
            raise ValueError(
                "memory_efficient_layer_norm needs apex' norm, apex with CUDA extensions cannot be imported; "
                "install it, or leave memory_efficient_layer_norm off"
            )
        return apex
    if fused is not None:
        return _transformer_engine_norm(fused)
    return plain if apex is None else apex
