"""What the baselines that train by masks are told, with their sources' defaults where these give one."""

from dataclasses import dataclass
from fractions import Fraction

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
