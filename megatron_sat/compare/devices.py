"""GPUs for training runs that are made side by side: which there are, whether their times compare, who gets which.

A run sees the one GPU that it is given and takes it for the first and only one.
"""

import json
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from megatron_sat.compare.stages import Place

VISIBLE = "CUDA_VISIBLE_DEVICES"
_NAMES = (
    "import json, torch; from torch import cuda; "
    "print(json.dumps([cuda.get_device_name(number) for number in range(cuda.device_count())]))"
)
_PATIENCE = 300.0
"""Seconds for the answer, from a host with many GPUs and a slow disk."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU that this process may use."""

    handle: str
    """What CUDA_VISIBLE_DEVICES calls it: a number, or a UUID."""
    name: str
    """Its kind, as the driver says it."""


def visible_devices(
    environment: Mapping[str, str], *, python: str, patience: float = _PATIENCE
) -> tuple[Device, ...]:
    """The GPUs that commands with this environment see, in their order; none without CUDA.

    Raises what `device_names` raises. python: the interpreter.
    """
    names = device_names(environment, python=python, patience=patience)
    shown = environment.get(VISIBLE)
    handles = [str(number) for number in range(len(names))] if shown is None else shown.split(",")
    # CUDA reads its list up to the first entry that is none
    return tuple(Device(handle=handle.strip(), name=name) for handle, name in zip(handles, names, strict=False))


def device_names(
    environment: Mapping[str, str] | None, *, python: str, patience: float = _PATIENCE
) -> tuple[str, ...]:
    """The kinds of the GPUs that commands with this environment see, in their order; none without CUDA.

    A process of its own is asked: one that looks for itself keeps memory on a GPU that a run is to have alone. Raises
    RuntimeError where it fails, or says nothing for ``patience`` seconds. environment: None is this process's own.
    python: the interpreter.
    """
    asked, own = (python, "-c", _NAMES), None if environment is None else dict(environment)
    try:
        done = subprocess.run(asked, env=own, capture_output=True, text=True, timeout=patience, check=False)
    except subprocess.TimeoutExpired as error:
        raise _silent(f"nothing in {patience:g} s") from error
    if done.returncode != 0:
        raise _silent((done.stderr.strip().splitlines() or ["nothing"])[-1])
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def _silent(said: str) -> RuntimeError:
    return RuntimeError(f"--gpus needs the names of the GPUs, torch says instead: {said}; see what nvidia-smi says")


def check_count(count: int, *, ranks: int, turns: int = 1) -> None:
    """Raise ValueError for what --gpus and --turns cannot be, whatever GPUs there are. ranks: of a run."""
    if turns < 1:
        raise ValueError(f"--turns must be at least 1, got {turns}; leave it out for runs one after the other")
    if count < 1:
        raise ValueError(f"--gpus must be at least 1, got {count}; leave it out for one run at a time")
    if count > 1 and ranks > 1:
        raise ValueError(
            f"--gpus ({count}) gives a run one GPU, budget: ranks ({ranks}) makes a run of several processes; set "
            "ranks to 1, or leave --gpus out"
        )


def alike(devices: Sequence[Device], *, count: int) -> tuple[str, ...]:
    """Handles of the first ``count``. Raises ValueError where there are fewer, or where they are not of one kind."""
    if not devices:
        raise ValueError(f"--gpus ({count}) needs CUDA, torch sees no GPU; leave it out for one run at a time")
    if count > len(devices):
        raise ValueError(
            f"--gpus must be at most the number of GPUs that are visible ({len(devices)}), got {count}; give "
            f"{len(devices)}, or show more of them by {VISIBLE}"
        )
    chosen = devices[:count]
    kinds = Counter(device.name for device in chosen)
    if len(kinds) > 1:
        found = ", ".join(f"{number} x {name}" for name, number in kinds.items())
        (kind, _), *_ = Counter(device.name for device in devices).most_common(1)
        same = [device.handle for device in devices if device.name == kind]
        raise ValueError(
            f"--gpus ({count}) needs GPUs of one kind, for times of runs are compared, got {found}; set "
            f"{VISIBLE}={','.join(same)} and give at most {len(same)}"
        )
    return tuple(device.handle for device in chosen)


def places(handles: Sequence[str], *, at_once: int, turns: int = 1, turn: Path | None = None) -> list[Place]:
    """Where runs are made: ``at_once`` places, spread over the GPUs in turn; without any, wherever a command goes.

    turns: so many places take turns where one would be; turn: the folder of their files, needed for more than one.
    """
    devices: Sequence[str | None] = handles or [None]
    chosen = list(islice(cycle(devices), at_once))
    if turns == 1:
        return [Place(device=device, at_once=at_once) for device in chosen]
    assert turn is not None
    files = [turn / f"{number}-{device or 'any'}" for number, device in enumerate(chosen)]
    pairs = turns * list(zip(chosen, files, strict=True))
    return [Place(device=device, at_once=at_once, turn=file) for device, file in pairs]
