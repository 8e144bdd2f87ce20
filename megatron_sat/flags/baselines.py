"""Settings of what SAT is compared with, and what must hold beside them."""

from fractions import Fraction
from typing import Any

from megatron_sat.baselines.settings import SPDF_MASKS, EstConfig, MstConfig, SpdfConfig
from megatron_sat.flags.flag import Flag, Settings, dashed, option
from megatron_sat.sparsity.growing import Growing
from megatron_sat.sparsity.schedule import ScheduleConfig

BY_MASKS = ("spdf", "mst")
"""Baselines that leave out single weights, by masks."""
ON_SPARSE_LAYERS = ("mst-structured", "est")
"""Those that are settings of SAT's own layers."""
KINDS = ("none", *BY_MASKS, *ON_SPARSE_LAYERS)
MST = ("mst", "mst-structured")
"""Those with MST's three phases."""

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
    option("mst_rate", "rate", help="s_u, share left out in the ultra-sparse phase, in [0, 1)"),
    option("mst_warmup", "int", help="steps of the first phase, from dense to s_u"),
    option("mst_restoration", "int", help="steps of the last phase, from s_u to dense"),
    option("mst_stages", "int", default=5, help="n, stages of the first and of the last phase"),
    option("mst_interval", "int", default=100, help="Δ, steps between two changes of what takes part"),
    option("mst_replaced", "float", default=0.3, help="ζ, share of what takes part that the first change replaces"),
    option("mst_random_share", "float", default=0.25, help="share of what grows that is random"),
    option(
        "mst_attention_stride",
        "int",
        default=128,
        help="w of the attention to the last w tokens and to every w-th before, in the ultra-sparse phase; 0: dense",
    ),
    option("est_rate", "rate", default="0.5", help="share of heads and channels left out in the first two stages"),
    option("est_layer_rate", "rate", default="0.5", help="share of layers left out in the first stage"),
    option("est_layers_until", "int", help="last step of the first stage; 0: no step leaves layers out"),
    option("est_until", "int", help="last step of the second stage; dense after it"),
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
_EST_NEEDS: tuple[tuple[str, Any, str], ...] = (
    ("engine", "megatron", "ZeRO waits for the gradients of layers that are left out"),
    ("overlap_param_gather", False, "weights of layers that are left out would never be waited for"),
    ("cpu_offloading", False, "it counts on every layer in every step"),
    ("sat_modules", "all", "it samples heads and channels"),
    ("sat_whole_ends", 0, "it samples in all layers"),
    ("sat_omit", "both", "it leaves out of both passes"),
    ("sat_omitted_neurons", "optimizer", "layers that are left out would be moved"),
)
"""(key, value, reason) beside EST."""


def phases(settings: Settings) -> dict[str, int]:
    """Further arguments of a `ScheduleConfig` of kind mst."""
    return {name: settings[f"mst_{name}"] for name in ("warmup", "restoration", "stages", "interval")}


def growing(settings: Settings, *, steps: int) -> Growing | None:
    """How kept units are replaced; None where MST's way of choosing is not used."""
    return _growing(settings, steps=steps) if settings["sat_selection"] == "mixed-growing" else None


def _growing(s: Settings, *, steps: int) -> Growing:
    return Growing(replaced=s["mst_replaced"], random_share=s["mst_random_share"], last_step=steps)


def resolve_baseline(settings: dict[str, Any], *, given: Settings) -> None:
    """Fill in the settings of the method that a baseline stands for. Raises ValueError for others than those."""
    kind = settings["baseline"]
    if kind != "mst-structured":
        for key, value in (("sat_schedule", "mst"), ("sat_selection", "mixed-growing")):
            if settings[key] == value:
                raise ValueError(f"{dashed(key)} {value} belongs to --baseline mst-structured, got it without; add it")
    if kind not in ON_SPARSE_LAYERS:
        return
    implied = _as_est(settings) if kind == "est" else _as_structured_mst(settings)
    for key, value in implied.items():
        if given.get(key) not in (None, value):
            raise ValueError(
                f"{dashed(key)} follows from --baseline {kind}, which makes it {value}, got {given[key]}; leave it out"
            )
    settings |= implied
    if kind == "mst-structured" and given.get("sat_importance") is None:
        settings["sat_importance"] = "contribution"


def _as_structured_mst(settings: dict[str, Any]) -> dict[str, Any]:
    """What it is in the method's settings."""
    _refuse_missing(settings)
    settings["mst_rate"] = _written(_rate(settings, "mst_rate"))
    return {
        "sat_schedule": "mst",
        "sat_omission_rate": settings["mst_rate"],
        "sat_selection": "mixed-growing",
        "sat_selection_interval": settings["mst_interval"],
    }


def _as_est(settings: dict[str, Any]) -> dict[str, Any]:
    """What its heads and channels are in the method's settings; the layers are its own."""
    _refuse_missing(settings, keys=("est_layers_until", "est_until"))
    for key in ("est_rate", "est_layer_rate"):
        settings[key] = _written(_rate(settings, key))
    return {
        "sat_schedule": "ladder",
        "sat_omission_rate": settings["est_rate"],
        "sat_schedule_start": settings["est_until"],
        "sat_rungs": 1,
        "sat_importance": "uniform",
        "sat_selection": "sampling",
        "sat_selection_interval": 1,
        "sat_rescale": "inverse-keep",
    }


def _refuse_missing(s: Settings, *, keys: tuple[str, ...] = ("mst_rate", "mst_warmup", "mst_restoration")) -> None:
    for key in keys:
        if s[key] is None:
            raise ValueError(f"--baseline {s['baseline']} needs {dashed(key)}, which is not given; add it")


def baseline_config(settings: Settings, *, steps: int) -> SpdfConfig | MstConfig | EstConfig | None:
    """What a baseline does beside the method's settings; None for another run."""
    if settings["baseline"] == "est":
        return EstConfig(
            layer_rate=_rate(settings, "est_layer_rate"),
            layers_until=settings["est_layers_until"],
            seed=settings["sat_seed"],
        )
    if settings["baseline"] == "mst":
        _refuse_missing(settings)
        rate = _rate(settings, "mst_rate")
        return MstConfig(
            schedule=ScheduleConfig(kind="mst", omission_rate=rate, train_iters=steps, **phases(settings)),
            growing=_growing(settings, steps=steps),
            attention_stride=settings["mst_attention_stride"],
            seed=settings["seed"],
        )
    if settings["baseline"] != "spdf":
        return None
    return SpdfConfig(
        rate=_rate(settings, "spdf_rate"),
        until=settings["spdf_until"],
        mask=settings["spdf_mask"],
        seed=settings["seed"],
    )


def _rate(settings: Settings, key: str) -> Fraction:
    """An exact share in [0, 1), as it was written."""
    try:
        rate = Fraction(settings[key])
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{dashed(key)} must be a number such as 0.5 or 1/2, got {settings[key]!r}") from None
    if not 0 <= rate < 1:
        raise ValueError(f"{dashed(key)} must be in [0, 1), got {settings[key]}; it is the share left out")
    return rate


def _written(rate: Fraction) -> str:
    """A share in one spelling, exact: a decimal where it has one, else a fraction."""
    decimal = repr(float(rate))
    return decimal if Fraction(decimal) == rate else str(rate)


def check_baseline(settings: Settings) -> None:
    """Raise ValueError where a baseline cannot be what its source describes. settings: resolved."""
    kind = settings["baseline"]
    if kind == "mst-structured":
        _check_structured(settings)
    for key, value, reason in _EST_NEEDS if kind == "est" else _NEEDS if kind in BY_MASKS else ():
        if settings.get(key, value) != value:
            wanted = f"{dashed(key)} {value}" if isinstance(value, str) else f"no {dashed(key)}"
            got = settings[key] if isinstance(value, str) else "it"
            raise ValueError(f"--baseline {kind} needs {wanted}, got {got}: {reason}; leave one of them out")
    if kind == "spdf":
        _check_spdf(settings)
    elif kind == "mst":
        _check_changes(settings)
    elif kind == "est":
        _check_est(settings)


def _check_changes(s: Settings) -> None:
    """What a change of masks, which is made before anybody judges the step, cannot stand beside."""
    if s["fp16"]:
        raise ValueError("--baseline mst needs --bf16 or fp32, got --fp16, whose overflows grow weights; use --bf16")
    if s["on_bad_step"] == "skip":
        raise ValueError(
            "--baseline mst needs --on-bad-step stop or rollback, got skip: a change of masks would stay; use rollback"
        )


def _check_structured(s: Settings) -> None:
    if s["sat_importance"] == "uniform":
        raise ValueError(
            "--baseline mst-structured needs scores that differ, got --sat-importance uniform; use contribution"
        )
    if s["sat_dp_selection"] == "local":
        raise ValueError(
            "--baseline mst-structured needs --sat-dp-selection shared, got local: a checkpoint carries one replica's "
            "choice, and the next one goes out from it; leave one of them out"
        )


def _check_est(s: Settings) -> None:
    first, second, steps = s["est_layers_until"], s["est_until"], _steps(s)
    if second > steps:
        raise ValueError(
            f"--est-until ({second}) must be at most --train-iters ({steps}); {steps} never becomes dense"
        )
    if first > second:
        raise ValueError(
            f"--est-layers-until must be at most --est-until ({second}), got {first}: the first stage comes before the "
            "second; lower it"
        )


def _steps(s: Settings) -> int:
    steps: int = s["train_iters"] or s["train_samples"] // s["global_batch_size"]
    return steps


def _check_spdf(s: Settings) -> None:
    steps = _steps(s)
    if s["spdf_until"] is None:
        raise ValueError(
            "--baseline spdf needs --spdf-until, which is not given; the paper compares with two thirds of the steps: "
            f"add --spdf-until {max(1, 2 * steps // 3)}"
        )
    if s["spdf_until"] > steps:
        raise ValueError(
            f"--spdf-until ({s['spdf_until']}) must be at most --train-iters ({steps}); {steps} never becomes dense"
        )
