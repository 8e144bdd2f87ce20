"""What a checkpoint says about its run: plain values, readable before anything is loaded."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

KEY = "megatron_sat"
"""Where it stands among the checkpoint's common values."""
EXTRA = "sat."
"""Prefix of a checkpoint's further tensors."""
_VERSION = 1


def plain(values: Any) -> Any:
    """Values as JSON knows them: what is none of its types (a dtype, a fraction, a path) by its text."""
    return json.loads(json.dumps(values, default=str))


@dataclass(frozen=True, kw_only=True)
class Header:
    """The state of a run besides its tensors."""

    iteration: int
    """Completed updates."""
    consumed_train_samples: int
    """Sequences read, of all data-parallel ranks together."""
    tokenizer: str | None
    """Fingerprint of the tokenizer; None where a model has no text (tests)."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What determines the order of the samples (blend, split, lengths, seed, batch): a change breaks an exact
    resume."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration of the run."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further values of whoever saves."""

    def to_plain(self) -> dict[str, Any]:
        """As it is saved."""
        return {"version": _VERSION, **plain(asdict(self))}

    @staticmethod
    def from_common(common: Mapping[str, Any]) -> "Header | None":
        """The header among a checkpoint's common values; None in a checkpoint of another program.

        Raises ValueError for one that a newer version wrote.
        """
        if KEY not in common:
            return None
        saved = dict(common[KEY])
        if (theirs := saved.pop("version")) != _VERSION:
            raise ValueError(
                f"the header of a checkpoint must be of version {_VERSION}, it is of version {theirs}; "
                "update megatron_sat, or start a new run from its weights with --finetune"
            )
        return Header(**saved)


def first_difference(saved: Any, *, now: Any, name: str) -> tuple[str, Any, Any] | None:
    """The first place where two plain values differ: its name, the saved value, the present one. None if equal."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in [*now, *(key for key in saved if key not in now)]:
            found = first_difference(saved.get(key), now=now.get(key), name=f"{name}.{key}" if name else str(key))
            if found:
                return found
        return None
    return None if saved == now else (name, saved, now)


def changes(saved: Mapping[str, Any], *, now: Mapping[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    """(key, saved value, present value) of the settings whose keys begin so and that differ: allowed, worth a line."""
    present = plain(now)
    keys = sorted(key for key in {*saved, *present} if key.startswith(prefix))
    return [(key, saved.get(key), present.get(key)) for key in keys if saved.get(key) != present.get(key)]
