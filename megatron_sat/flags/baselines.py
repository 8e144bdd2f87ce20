"""Settings of what SAT is compared with, and what must hold beside them."""

from fractions import Fraction
from typing import Any

from megatron_sat.baselines.settings import SPDF_MASKS, SpdfConfig
from megatron_sat.flags.flag import Flag, Settings, dashed, option

BY_MASKS = ("spdf",)
"""Baselines that leave out single weights, by masks."""
KINDS = ("none", *BY_MASKS)

BASELINES: tuple[Flag, ...] = (
    option("baseline", choices=KINDS, default="none", help="a method that SAT is compared with"),
    option("spdf_rate", "rate", default="0.5", help="share of each matrix that is zero, in [0, 1)"),
    option("spdf_until", "int", help="η, the last step with zeros; dense after it"),
    option(
        "spdf_mask",
        choices=SPDF_MASKS,
        default="magnitude",
        help="which weights are zero: of least magnitude, or random, as its authors do who train from scratch",
    ),
)
_NEEDS: tuple[tuple[str, Any, str], ...] = (
    ("sat_schedule", "none", "the model is sparse in one way at a time"),
    ("engine", "megatron", "masks need gradients that are whole after the reduction"),
    ("optimizer", "adam", "another optimizer moves weights that have no gradient"),
    ("train_only", "all", "masked matrices would not train at all"),
    ("optimizer_cpu_offload", False, "masked weights must be zero in the optimizer's copies"),
    ("use_precision_aware_optimizer", False, "masked weights must be zero in the optimizer's copies"),
)
"""(key, value, reason) beside a baseline by masks."""


def spdf_config(settings: Settings) -> SpdfConfig | None:
    """The settings of SPDF; None for another run."""
    if settings["baseline"] != "spdf":
        return None
    return SpdfConfig(
        rate=_rate(settings, "spdf_rate"),
        until=settings["spdf_until"],
        mask=settings["spdf_mask"],
        seed=settings["seed"],
    )


def _rate(settings: Settings, key: str) -> Fraction:
    """An exact share, as it was written."""
    try:
        return Fraction(settings[key])
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{dashed(key)} must be a number such as 0.5 or 1/2, got {settings[key]!r}") from None


def check_baseline(settings: Settings) -> None:
    """Raise ValueError where a baseline cannot be what its source describes. settings: resolved."""
    kind = settings["baseline"]
    if kind not in BY_MASKS:
        return
    for key, value, reason in _NEEDS:
        if settings.get(key, value) != value:
            wanted = f"{dashed(key)} {value}" if isinstance(value, str) else f"no {dashed(key)}"
            got = settings[key] if isinstance(value, str) else "it"
            raise ValueError(f"--baseline {kind} needs {wanted}, got {got}: {reason}; leave one of them out")
    if kind == "spdf":
        _check_spdf(settings)


def _check_spdf(s: Settings) -> None:
    steps = s["train_iters"] or s["train_samples"] // s["global_batch_size"]
    if s["spdf_until"] is None:
        raise ValueError(
            "--baseline spdf needs --spdf-until, which is not given; the paper compares with two thirds of the steps: "
            f"add --spdf-until {max(1, 2 * steps // 3)}"
        )
    if s["spdf_until"] > steps:
        raise ValueError(
            f"--spdf-until ({s['spdf_until']}) must be at most --train-iters ({steps}); {steps} never becomes dense"
        )
