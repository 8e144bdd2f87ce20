"""Does a model fit a checkpoint? Compared by the names and whole shapes of their tensors, before anything is loaded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Shape = tuple[int, ...]
_NAMED = 5  # differences that a message spells out


@dataclass(frozen=True)
class Wanted:
    """A tensor that a model asks of a checkpoint."""

    shape: Shape
    """Of the whole tensor: [layers, ...] where the layers of a model are stacked."""
    padded: bool
    """Its first dim is a vocabulary that each run pads to its own multiple."""


def wanted_tensors(state: Mapping[str, Any]) -> dict[str, Wanted]:
    """All tensors that a rank's sharded state names. state: of a model, as `sharded_state_dict` gives it."""
    found: dict[str, Wanted] = {}
    for entry in nested_values(state):
        for tensor in _tensors_of(entry):
            found[tensor.key] = Wanted(tuple(tensor.global_shape), bool(tensor.allow_shape_mismatch))
    return found


def _tensors_of(entry: Any) -> Iterable[ShardedTensor]:
    if isinstance(entry, ShardedTensor):
        return [entry]
    if isinstance(entry, ShardedTensorFactory):
        return [tensor for built in _values(entry.build()) for tensor in _tensors_of(built)]
    return []


def _values(built: Any) -> Iterable[Any]:
    return nested_values(built) if isinstance(built, dict | list) else [built]


def misfits(wanted: Mapping[str, Wanted], *, saved: Mapping[str, Shape], padding_known: bool) -> list[str]:
    """One line a tensor that differs, by name. saved: the checkpoint's model tensors.

    padding_known: model and checkpoint are known to have the same vocabulary, so that only its padding can differ.
    """
    lines = []
    for name in sorted(wanted.keys() | saved.keys()):
        if name not in saved:
            lines.append(f"{name}: {list(wanted[name].shape)} in the model, absent from the checkpoint")
        elif name not in wanted:
            lines.append(f"{name}: {list(saved[name])} in the checkpoint, absent from the model")
        elif saved[name] != wanted[name].shape and not (
            padding_known and wanted[name].padded and saved[name][1:] == wanted[name].shape[1:]
        ):
            lines.append(f"{name}: {list(wanted[name].shape)} in the model, {list(saved[name])} in the checkpoint")
    return lines


def refuse_misfits(lines: list[str], *, folder: str) -> str | None:
    """The message about tensors that do not fit, or None."""
    if not lines:
        return None
    more = f"\n  and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    named = "".join(f"\n  {line}" for line in lines[:_NAMED])
    return (
        f"the model must have the shape of the checkpoint {folder}, {len(lines)} tensors "
        f"differ:{named}{more}\nset the model's flags as they were when it was saved, or choose another "
        "checkpoint"
    )
