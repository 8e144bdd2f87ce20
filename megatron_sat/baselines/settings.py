"""What the baselines beside SAT's own layers are told, with their sources' defaults where these give one."""

from dataclasses import dataclass
from fractions import Fraction

from megatron_sat.sparsity.growing import Growing
from megatron_sat.sparsity.schedule import ScheduleConfig
from megatron_sat.sparsity.selection import keep_count

SPDF_MASKS = ("magnitude", "random")


@dataclass(frozen=True, kw_only=True)
class SpdfConfig:
    """SPDF. Field names are the flags ``--spdf-*``."""

    rate: Fraction
    """The share of each matrix that is zero, in [0, 1)."""
    until: int
    """The last step with zeros, at least 1."""
    mask: str
    """Which weights are zero: of least magnitude (on a pre-trained model), or random (from scratch)."""
    seed: int
    """Of random masks."""

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"--spdf-rate must be in [0, 1), got {self.rate}; the SAT paper compares with 0.5")
        if self.until < 1:
            raise ValueError(f"--spdf-until must be at least 1, got {self.until}; --baseline none trains densely")
        if self.mask not in SPDF_MASKS:
            raise ValueError(f"--spdf-mask must be one of {', '.join(SPDF_MASKS)}, got {self.mask!r}")


@dataclass(frozen=True, kw_only=True)
class EstConfig:
    """The layers that EST leaves out; heads and channels are a schedule and a selection. Fields: flags ``--est-*``."""

    layer_rate: Fraction
    """The share of the layers that a step leaves out, in [0, 1)."""
    layers_until: int
    """The last step that leaves layers out, at least 0."""
    seed: int
    """Of which layers."""

    def __post_init__(self) -> None:
        if not 0 <= self.layer_rate < 1:
            raise ValueError(f"--est-layer-rate must be in [0, 1), got {self.layer_rate}; 0.5 is every second layer")
        if self.layers_until < 0:
            raise ValueError(f"--est-layers-until must be at least 0, got {self.layers_until}; 0 leaves none out")

    def kept(self, num_layers: int, *, step: int) -> int:
        """How many of the model's layers take part in ``step``."""
        return num_layers if step > self.layers_until else keep_count(num_layers, self.layer_rate)


@dataclass(frozen=True, kw_only=True)
class MstConfig:
    """MST by masks. Field names are the flags ``--mst-*``."""

    schedule: ScheduleConfig
    """Of kind mst; its rate is the share of the matrices' weights left out, its interval at least 2."""
    growing: Growing
    """How much changes at a time."""
    attention_stride: int
    """w of the local and strided attention in the ultra-sparse phase, at least 1; 0: attention is dense throughout."""
    seed: int
    """Of what grows at random."""

    def __post_init__(self) -> None:
        assert self.schedule.kind == "mst" and self.schedule.interval is not None
        if self.schedule.interval < 2:
            raise ValueError(
                f"--mst-interval must be at least 2 with --baseline mst, got {self.schedule.interval}: a change takes "
                "the place of an update; its authors use 100"
            )
        if self.attention_stride < 0:
            raise ValueError(f"--mst-attention-stride must be at least 0, got {self.attention_stride}; 0 is dense")
