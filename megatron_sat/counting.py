"""What a baseline by masks would cost where a weight that is left out costs nothing: the count of its source.

Masks save no operation on any hardware here, a step takes as long as a dense one. The figures are for a comparison at
equal published operations, as the sources make it; at equal time the baseline is dense training with fewer weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_sat.baselines.settings import MstConfig, SpdfConfig
from megatron_sat.model.flops import ModelShape, hybrid_share, masked_step_flops
from megatron_sat.sparsity.schedule import build_schedule


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps of one cost."""

    first: int
    """From 1."""
    last: int
    """Itself included."""
    density: Fraction
    """Share of the matrices' weights that takes part."""
    flops: Fraction
    """Of one step."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A run's cost by the count of its source."""

    what: str
    """What the method does, in a sentence's part."""
    stretches: tuple[Stretch, ...]
    """In order, covering all steps."""
    dense_step_flops: Fraction
    """A dense step, counted likewise."""

    @property
    def share(self) -> Fraction:
        """Of the whole run, over a dense one's."""
        steps = sum(each.last - each.first + 1 for each in self.stretches)
        executed = sum((each.last - each.first + 1) * each.flops for each in self.stretches)
        return executed / (steps * self.dense_step_flops)

    def lines(self) -> list[str]:
        """For a reader of the plan."""
        counted = f"counted as published: {float(self.share):.3f} of a dense run's operations"
        return [self.what, f"{counted}; by masks a step takes as long as a dense one"]

    def as_dict(self) -> Mapping[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "what": self.what,
            "share_of_dense": float(self.share),
            "dense_step_flops": float(self.dense_step_flops),
            "stretches": [
                {"first": s.first, "last": s.last, "density": float(s.density), "step_flops": float(s.flops)}
                for s in self.stretches
            ],
        }


def count_spdf(config: SpdfConfig, *, shape: ModelShape, tokens_per_step: int, steps: int) -> Counted:
    """SPDF: a share of each matrix until a step, all of it after."""
    ends = [(1, min(config.until, steps), 1 - config.rate), (config.until + 1, steps, Fraction(1))]
    return Counted(
        what=(
            f"SPDF: {float(config.rate):g} of each matrix's weights, by {config.mask}, are zero until step "
            f"{config.until}; then all train"
        ),
        stretches=tuple(
            Stretch(
                first=first,
                last=last,
                density=density,
                flops=masked_step_flops(shape, density=density, tokens=tokens_per_step),
            )
            for first, last, density in ends
            if first <= last
        ),
        dense_step_flops=masked_step_flops(shape, density=Fraction(1), tokens=tokens_per_step),
    )


def count_mst(config: MstConfig, *, shape: ModelShape, tokens_per_step: int) -> Counted:
    """MST: (3 f_S Δ + 2 f_S + f_D) / (Δ + 1) a step, f_S and f_D a sparse and a dense forward.

    A change of masks takes the gradients of all weights, a third of a step, in one of Δ + 1 steps, as published.
    """
    schedule, interval, stride = config.schedule, config.schedule.interval, config.attention_stride
    assert interval is not None
    ultra = hybrid_share(shape.seq_length, stride=stride) if stride else Fraction(1)
    dense = masked_step_flops(shape, density=Fraction(1), tokens=tokens_per_step)

    def stretch(first: int, last: int, rate: Fraction) -> Stretch:
        attended = ultra if rate == schedule.omission_rate else Fraction(1)
        sparse = masked_step_flops(shape, density=1 - rate, tokens=tokens_per_step, attended=attended)
        mean = (sparse * interval + Fraction(2, 3) * sparse + Fraction(1, 3) * dense) / (interval + 1)
        return Stretch(first=first, last=last, density=1 - rate, flops=mean)

    rungs = build_schedule(schedule).rungs()
    attention = f", attention is to the last {stride} tokens and every {stride}-th" if stride else ""
    return Counted(
        what=(
            f"MST: up to {float(schedule.omission_rate or 0):g} of the matrices' weights are zero, others every "
            f"{interval} steps, whose last changes them and updates nothing{attention}; dense at the end"
        ),
        stretches=tuple(stretch(rung.first, rung.last, rung.rate) for rung in rungs),
        dense_step_flops=dense,
    )
