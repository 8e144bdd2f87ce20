"""How neurons are scored and chosen, as the ``--sat-*`` flags say it."""

from dataclasses import dataclass
from typing import Literal

from megatron_sat.sparsity.growing import Growing
from megatron_sat.sparsity.importance import METRICS

MODULES = ("all", "attention", "mlp")
SELECTIONS = ("sampling", "top-k", "mixed-growing")
PASSES = ("both", "backward", "weight-gradient")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How neurons are scored and chosen. Each field is the ``--sat-*`` flag of its name; left out, the paper's."""

    importance: str = "maxip"
    """A key of `importance.METRICS`."""
    swiglu_score: str = "gate"
    """Rows of a gated fc1 that score a channel: gate, up, gate+up. Ours; the paper has no gate."""
    selection: str = "sampling"
    """sampling (softmax of scores / temperature, without replacement), top-k, or mixed-growing (MST's)."""
    growing: Growing | None = None
    """How mixed-growing replaces units; None for the others."""
    temperature: float = 0.05
    """τ of eq. 8, above 0; used by sampling."""
    selection_groups: int = 1
    """G: quotas are per group of n/G heads and f/G channels; a multiple of the TP size."""
    selection_interval: int = 1
    """Steps that a choice is kept, at least 1 (paper: 1)."""
    channel_multiple: int = 1
    """Kept channels of a selection group are floored to a multiple of this."""
    gqa: str = "group"
    """What leaves under grouped-query attention: whole groups (group), or heads within every group (head)."""
    statistics: str = "fresh"
    """fresh: from the step's first micro-batch (the paper); lagged: from the step before."""
    dp_selection: str = "shared"
    """shared: replicas add their sums and choose alike; local: each for itself."""
    rescale: str = "none"
    """none (the paper), or inverse-keep: a sparse module's output times 1 / (share kept)."""
    modules: str = "all"
    """What omits neurons: all, or attention or mlp alone. Ours; the paper's is all."""
    omit: str = "both"
    """What leaves omitted neurons out. both: all passes (the paper); backward: they take part in the forward alone, the
    loss is the dense model's, its gradient that of the kept neurons; weight-gradient: only their weights' gradients
    are not computed, those of kept neurons are the dense model's. The last two are ours."""
    whole_ends: int = 0
    """Layers at each end of the model, the first and the last so many, that omit none. Ours; the paper has none."""
    seed: int = 1234
    """Seed of the selection noise."""

    def __post_init__(self) -> None:
        _one_of("--sat-importance", self.importance, tuple(METRICS))
        _one_of("--sat-swiglu-score", self.swiglu_score, ("gate", "up", "gate+up"))
        _one_of("--sat-selection", self.selection, SELECTIONS)
        if self.selection == "mixed-growing" and self.growing is None:
            raise ValueError(
                "--sat-selection mixed-growing must have the settings of --baseline mst-structured, whose it is, got "
                "none; use sampling or top-k"
            )
        if self.selection != "mixed-growing" and self.growing is not None:
            raise ValueError(
                f"growing must be None with --sat-selection {self.selection}, got {self.growing}; leave it out"
            )
        _one_of("--sat-gqa", self.gqa, ("group", "head"))
        _one_of("--sat-statistics", self.statistics, ("fresh", "lagged"))
        _one_of("--sat-dp-selection", self.dp_selection, ("shared", "local"))
        _one_of("--sat-rescale", self.rescale, ("none", "inverse-keep"))
        _one_of("--sat-modules", self.modules, MODULES)
        _one_of("--sat-omit", self.omit, PASSES)
        if self.omit != "both" and self.rescale != "none":
            raise ValueError(
                f"--sat-rescale must be none with --sat-omit {self.omit}, got {self.rescale}: nothing is missing from "
                "an output; leave it out"
            )
        if self.whole_ends < 0:
            raise ValueError(f"--sat-whole-ends must be at least 0, got {self.whole_ends}")
        _at_least_one("--sat-selection-groups", self.selection_groups)
        _at_least_one("--sat-selection-interval", self.selection_interval)
        _at_least_one("--sat-channel-multiple", self.channel_multiple)
        if not self.temperature > 0:
            raise ValueError(
                f"--sat-temperature must be above 0, got {self.temperature}; the paper uses 0.05"
            )

    def omits(self, kind: Literal["attention", "mlp"], *, layer: int, num_layers: int) -> bool:
        """Whether the module of that kind in global layer ``layer`` (from 1) omits neurons in a sparse step."""
        return self.modules in ("all", kind) and self.whole_ends < layer <= num_layers - self.whole_ends

    def whole_layers(self, num_layers: int) -> int:
        """How many layers omit nothing. Raises ValueError where that would be all."""
        if 2 * self.whole_ends >= num_layers:
            raise ValueError(
                f"--sat-whole-ends ({self.whole_ends}) at both ends must leave some of the {num_layers} layers; "
                f"lower it below {(num_layers + 1) // 2}"
            )
        return 2 * self.whole_ends
