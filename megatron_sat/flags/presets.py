"""The paper's runs by name: what ``--sat-preset`` fills in where nothing else was given.

``paper`` is its continual pre-training, ``paper-sft`` its fine-tuning (section 3.2). Where training is longer or
shorter than the paper's, the ladder starts at the same part of it. ``--sat-schedule none`` beside a preset is the dense
run with everything else alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_sat.flags.finetuning import settle_epochs
from megatron_sat.flags.flag import Flag, Settings, option


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One of the paper's runs."""

    training: Mapping[str, Any]
    """Settings besides the method's."""
    train_iters: int
    """T."""
    train_epochs: int | None = None
    """What the paper says in place of T, for runs on instruction data."""
    method: Mapping[str, Any]
    """Settings of the method."""
    start: int
    """η, of T."""


CHOICE: dict[str, Any] = {
    "sat_importance": "maxip",
    "sat_selection": "sampling",
    "sat_temperature": 0.05,
    "sat_selection_interval": 1,
}
"""How the paper chooses neurons."""
_METHOD = {"sat_schedule": "ladder", **CHOICE}
PRESETS: dict[str, Preset] = {
    "paper": Preset(
        training={"global_batch_size": 1024, "lr": 5e-5, "lr_decay_style": "cosine"},
        train_iters=3000,
        method={**_METHOD, "sat_omission_rate": "0.5", "sat_rungs": 5},
        start=2000,
    ),
    "paper-sft": Preset(
        training={"global_batch_size": 128, "lr": 1e-5, "lr_decay_style": "cosine"},
        train_iters=1200,
        train_epochs=3,
        method={**_METHOD, "sat_omission_rate": "0.96", "sat_rungs": 1},
        start=600,
    ),
}
PRESET: tuple[Flag, ...] = (
    option("sat_preset", choices=tuple(PRESETS), help="the paper's settings, where nothing else is given"),
)
_READ_BY: dict[str, tuple[str, str]] = {
    "sat_temperature": ("sat_selection", "sampling"),
    "sat_rungs": ("sat_schedule", "ladder"),
    "sat_schedule_start": ("sat_schedule", "ladder"),
}
"""A setting, and which other one must have which value for it to be read."""


def fill_in(given: Settings) -> dict[str, Any]:
    """What was given, with a preset's settings where it says nothing, and epochs as updates. See `settle_epochs`."""
    known = {key: value for key, value in given.items() if value is not None}
    name = known.get("sat_preset")
    if name is None:
        return settle_epochs(given)
    preset = PRESETS[name]
    filled = {**preset.training, **known}
    if not {"train_iters", "train_samples", "train_epochs"} & known.keys():
        epochs = preset.train_epochs if known.get("sft") else None
        filled |= {"train_iters": preset.train_iters} if epochs is None else {"train_epochs": epochs}
    filled = settle_epochs(filled)
    if filled.get("sat_schedule") == "none":
        return filled
    filled = {**preset.method, **filled}
    steps = filled.get("train_iters") or filled["train_samples"] // filled["global_batch_size"]
    filled.setdefault("sat_schedule_start", int(Fraction(preset.start, preset.train_iters) * steps))
    for key, (other, value) in _READ_BY.items():
        if key not in known and filled[other] != value:
            del filled[key]
    return filled
