"""What a sparse model must carry from a checkpoint into a resumed run, as text that fits into trainer_state.json.

With ``statistics="fresh"`` and a new choice every step there is nothing: a step chooses from its own tokens and from
noise that its number gives. Otherwise choices or sums outlive a step, and a resumed run needs them to go on as the
uninterrupted one would. The settings travel along, so that a run is not resumed under others unnoticed.
"""

import base64
import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from megatron_sat.hf.model import SparseModel

_DTYPES = {str(dtype): dtype for dtype in (torch.uint8, torch.int32, torch.int64, torch.float32)}
_NOT_SAVED = "visits"  # counts for plots; thousands of numbers a layer


def settings(sparse: SparseModel) -> dict[str, Any]:
    """The selection and the schedule's rungs, in JSON's types."""
    rungs = [[rung.first, rung.last, str(rung.rate)] for rung in sparse.schedule.rungs()]
    found: dict[str, Any] = {"selection": dataclasses.asdict(sparse.selection), "rungs": rungs}
    as_read: dict[str, Any] = json.loads(json.dumps(found, default=str))  # a tuple comes back as a list
    return as_read


def outlives_a_step(sparse: SparseModel) -> bool:
    """Whether a step depends on more than its own number and tokens."""
    return sparse.selection.statistics == "lagged" or sparse.selection.selection_interval > 1


def save(sparse: SparseModel) -> dict[str, Any]:
    """Settings and, where they outlive a step, choices and sums of every block."""
    blocks = []
    if outlives_a_step(sparse):
        for selector in sparse.controller.selectors:
            state = selector.state()
            blocks.append({name: _write(tensor) for name, tensor in state.items() if name != _NOT_SAVED})
    return {"settings": settings(sparse), "blocks": blocks}


def load(sparse: SparseModel, saved: dict[str, Any]) -> None:
    """Take over what `save` gave. Raises ValueError where it was made under other settings."""
    here = settings(sparse)
    for part, value in saved["settings"].items():
        if value != here[part]:
            raise ValueError(
                f"the {part} of a resumed run must be those of its checkpoint, {_difference(value, here[part])}; "
                "resume with the same, or start a new run from the checkpoint's weights"
            )
    for selector, block in zip(sparse.controller.selectors, saved["blocks"], strict=False):
        tensors = {name: _read(text) for name, text in block.items()}
        selector.load_state(tensors | {_NOT_SAVED: selector.visits})


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, dict):
        names = [name for name in here if there.get(name) != here[name]]
        there, here = {n: there.get(n) for n in names}, {n: here[n] for n in names}
    return f"got {here} instead of {there}"


def _write(tensor: Tensor) -> list[str]:
    """dtype and bytes. All that is saved has one dimension."""
    raw = bytes(tensor.contiguous().view(torch.uint8).tolist())
    return [str(tensor.dtype), base64.b64encode(raw).decode("ascii")]


def _read(text: list[str]) -> Tensor:
    dtype, raw = text
    return torch.frombuffer(bytearray(base64.b64decode(raw)), dtype=_DTYPES[dtype])
