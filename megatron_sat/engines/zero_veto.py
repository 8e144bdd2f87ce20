"""A last look at an update before DeepSpeed makes it; see `veto` for the one on megatron.core.

DeepSpeed takes the gradient's norm inside ``step()``, and where that is no number it throws the gradients away and
moves nothing. So the method that gives the norm is wrapped on the instance: it is listened to, and where the update
has no leave it answers as for a norm that is no number. Each of DeepSpeed's three optimizers (0.19) has another such
method; at stage 0 there is none, and the engine asks by itself.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_sat.engines.veto import Verdict, permitted

NONE = -1.0
"""What DeepSpeed writes for a norm that is not finite."""


class ZeroVeto:
    """Asks before each update of the optimizer that ``deepspeed.initialize`` made."""

    def __init__(
        self, optimizer: Any, *, verdict: Verdict, replicas: dist.ProcessGroup, norm_of: Callable[..., Any]
    ) -> None:
        """replicas: ranks with the same part of the model, which must decide alike. norm_of: DeepSpeed's
        ``get_global_norm_of_tensors``, for the optimizer that takes its norm by it."""
        self.loss = 0.0
        """Of the step under way; whoever steps the engine sets it."""
        self.asked = False
        """Whether the step under way was asked about."""
        self._verdict, self._replicas = verdict, replicas
        if hasattr(optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
            optimizer.scaled_global_norm = self._of_one(
                optimizer.scaled_global_norm, scale=lambda: optimizer.loss_scale
            )
        elif hasattr(optimizer, "_get_norm_groups"):  # ZeRO 3
            optimizer._get_norm_groups = self._of_groups(optimizer._get_norm_groups, scale=lambda: optimizer.loss_scale)
        elif hasattr(optimizer, "get_grads_for_norm"):  # ZeRO 1 in bf16 with gradients in fp32
            optimizer.get_grads_for_norm = self._of_gradients(optimizer, norm_of=norm_of)

    def begin(self, loss: float) -> None:
        """A step of this loss is about to be made."""
        self.loss, self.asked = loss, False

    def permits(self, norm: float) -> bool:
        """Whether the update may be made; collective over the replicas."""
        self.asked = True
        return permitted(self._verdict(self.loss, norm), replicas=self._replicas)

    def _of_one(self, norm: Callable[..., Any], *, scale: Callable[[], float]) -> Callable[..., Any]:
        def listened(*args: Any, **kwargs: Any) -> Any:
            found = norm(*args, **kwargs)
            return found if self.permits(_plain(float(found), scale=scale())) else torch.full_like(found, NONE)

        return listened

    def _of_groups(self, norms: Callable[[], Any], *, scale: Callable[[], float]) -> Callable[[], Any]:
        def listened() -> Any:
            found = norms()
            each = [_plain(float(norm), scale=scale()) for norm in found]
            whole = sum(norm**2 for norm in each) ** 0.5
            return found if self.permits(whole) else [torch.full_like(norm, NONE) for norm in found]

        return listened

    def _of_gradients(self, optimizer: Any, *, norm_of: Callable[..., Any]) -> Callable[..., Any]:
        gradients = optimizer.get_grads_for_norm

        def listened(*args: Any, **kwargs: Any) -> Any:
            found = gradients(*args, **kwargs)
            if args or kwargs:  # for clipping, later in the same step
                return found
            norm = norm_of(input_tensors=found[0], mpu=optimizer.mpu, norm_type=optimizer.norm_type)
            if self.permits(_plain(float(norm), scale=1.0)):
                return found
            return [torch.full_like(optimizer.fp32_groups_flat_partition[0][:1], torch.nan)], found[1]

        return listened


def _plain(norm: float, *, scale: float) -> float:
    return norm / scale if norm >= 0 else torch.nan
