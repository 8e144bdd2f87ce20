"""A transformer layer that a step may pass by, whole: hidden states go through, and its weights get no gradient.

Which layers that are, the selectors of a layer's modules know for the step (`Selector.left_out`). Megatron's DDP, where
it reduces gradients while others are still computed, waits for every weight: those of a layer that is passed by tell it
that there is nothing to wait for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import Parameter

from megatron_sat.layers.sparse import SparsePair


class PassableLayer(TransformerLayer):
    """Megatron's layer, but where its selectors are left out of the step."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's: (hidden states [s, b, h], context)."""
        if not self.is_passed_by:
            return super().forward(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return pass_by(hidden, [p for p in self.parameters() if p.requires_grad]), kwargs.get("context")

    @property
    def is_passed_by(self) -> bool:
        """Whether the step under way leaves this layer out."""
        pair = self.self_attention
        return isinstance(pair, SparsePair) and pair.selector is not None and pair.selector.left_out


def pass_by(hidden: Tensor, parameters: Sequence[Parameter]) -> Tensor:
    """``hidden`` [s, b, h] itself, behind which a backward gives each of the parameters a gradient of zero."""
    passed: Tensor = _PassBy.apply(hidden, *parameters)
    return passed


class _PassBy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Parameter) -> Tensor:
        ctx.parameters = parameters
        return hidden.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(_nothing(parameter) for parameter in ctx.parameters)


def _nothing(parameter: Any) -> Tensor:
    """A gradient of zero; where DDP keeps the sum (main_grad), one that it does not add and so need not be written."""
    if not hasattr(parameter, "main_grad"):
        return torch.zeros_like(parameter)
    parameter.grad_added_to_main_grad = True
    return torch.empty_like(parameter)  # never read: hooks run only where a gradient arrives
