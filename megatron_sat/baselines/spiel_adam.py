"""Adam for single entries that come and go: each has an age, by which its moments' bias is corrected.

As SpIEL's authors do it (their code; Ansell et al., 2024): an update is

    m = β₁ m + (1 - β₁) g,  v = β₂ v + (1 - β₂) g²,  φ = (φ - η m/(1 - β₁ᵃ) / (√(v/(1 - β₂ᵃ)) + ε')) (1 - η λ)

with an entry's own age a, 1 in its first update; ε' = ε/√(1 - β₂ᵃ), for they add ε to √v before it is corrected. An
entry that comes in place of another is given moments and an age, and goes on from them.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

BETAS = (0.9, 0.999)
EPS = 1e-6
"""β₁, β₂ and ε of SpIEL's authors."""


class SpielAdamW(Optimizer):
    """Of parameters of one dimension. State of each: exp_avg, exp_avg_sq and age, fp32, of the parameter's shape."""

    def __init__(
        self,
        parameters: Iterable[Parameter],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
    ) -> None:
        """weight_decay: λ, decoupled: an update takes the share η λ of what it has made."""
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of everything that has a gradient; returns what ``closure`` gave, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group=group)
        return loss

    @torch.no_grad()
    def plant(self, parameter: Parameter, *, where: Tensor, mean: Tensor, square: Tensor, age: int) -> None:
        """Entries ``where`` (int64 [n]) of a parameter are new: their moments (fp32 [n]) and their age, at least 1."""
        state = self._state_of(parameter)
        state["exp_avg"][where], state["exp_avg_sq"][where], state["age"][where] = mean, square, float(age)

    def _state_of(self, parameter: Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["age"] = torch.ones_like(parameter, dtype=torch.float32)
        return state

    def _update(self, parameter: Parameter, *, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state, gradient = self._state_of(parameter), parameter.grad.float()
        mean, square, age = state["exp_avg"], state["exp_avg_sq"], state["age"]
        first, second = group["betas"]
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        step = square.sqrt().add_(group["eps"]).reciprocal_().mul_(mean)
        step.mul_((1 - second**age).sqrt_()).div_(1 - first**age)
        parameter.sub_(step.mul_(group["lr"]).to(parameter.dtype)).mul_(1 - group["lr"] * group["weight_decay"])
        age.add_(1)
