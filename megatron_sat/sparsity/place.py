"""Where a selector stands: which neurons it is in charge of, the two matrices they lie in, and which tokens count."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which neurons a selector is in charge of: a layer's module, this rank's part of it, its quotas."""

    kind: Literal["attention", "mlp"]
    layer: int
    """Global layer number, from 1: what the noise is drawn from."""
    shard: int
    """This rank's place among the equal shards (TP rank)."""
    num_shards: int
    """TP size."""
    groups: int
    """Selection groups inside this shard."""
    multiple: int
    """Kept units of a group are floored to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The two matrices a module's neurons lie in."""

    column: Callable[[], Tensor]
    """fc1 or qkv, [rows, h]: a neuron is some of its rows."""
    row: Callable[[], Tensor]
    """fc2 or proj, [h, columns]: a neuron is some of its columns."""
    arrive: Callable[[], None] = lambda: None
    """Waits for what other ranks still send of the two; called before they are scored, and then alone."""
    whole: Callable[[Tensor], Tensor] = lambda weight: weight
    """One of the two with all its values, where this rank may have been left a shard of them; called on the one that
    is scored, and then alone."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Which tokens of a forward count: padding says nothing about a neuron."""

    inputs: Tensor
    """Bool, as the module's input without its last dimension: [s, b], a shard of the sequence under SP."""
    activations: Tensor
    """Bool, likewise of what the row-parallel weight takes in."""
