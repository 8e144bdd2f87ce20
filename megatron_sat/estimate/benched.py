"""What a benchmark's file says of the program that it timed: its flags, and how many ranks shared a model.

Files name both since they can be compared; in older ones they are read out of the command, whose quotes were lost.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sat.estimate.hardware import slug
from megatron_sat.flags.table import table
from megatron_sat.rehearsal.cluster import GPUS

FLAGS, TENSOR = "--flags", "--tensor-parallel"
"""Of the benchmarks: more flags of the program, and the ranks of a model."""


@dataclass(frozen=True, kw_only=True)
class Benched:
    """How the program ran."""

    device: str
    """As the driver calls it."""
    flags: tuple[str, ...]
    """Beyond those of the benchmark's size."""
    tensor: int
    """Ranks of one model."""

    def gpu(self, *, ranks: int) -> str:
        """The kind of GPU in the data sheets; of one rank any, for it sends nothing.

        Raises ValueError for several ranks on a device without one.
        """
        words = slug(self.device).split("-")
        kind = next((kind for kind in GPUS if kind in words), None)
        if kind is None and ranks > 1:
            raise ValueError(
                f"--compare with {ranks} ranks must be of a device whose NVLink is known ({', '.join(GPUS)}), got "
                f"{self.device}; compare what one rank measured"
            )
        return kind or next(iter(GPUS))


def read_benched(found: Mapping[str, Any]) -> Benched:
    """found: what bench_step, bench_ladder or bench_layer wrote."""
    words = shlex.split(found["about"]["command"])
    flags = shlex.split(found["flags"]) if "flags" in found else _flags_in(words)
    tensor = found["tensor_parallel"] if "tensor_parallel" in found else _tensor_in(words)
    return Benched(device=found["about"]["device"], flags=tuple(flags), tensor=tensor)


def _flags_in(words: Sequence[str]) -> list[str]:
    """From --flags=... on, whatever the program knows, to the benchmark's next option."""
    start = next((i for i, word in enumerate(words) if word.startswith(FLAGS + "=")), None)
    if start is None:
        return []
    flags = shlex.split(words[start].removeprefix(FLAGS + "="))
    for word in words[start + 1 :]:
        if word.startswith("--") and word.partition("=")[0] not in table().by_name:
            break
        flags.append(word)
    return flags


def _tensor_in(words: Sequence[str]) -> int:
    line = " ".join(words).replace(TENSOR + "=", TENSOR + " ").split()
    return int(line[line.index(TENSOR) + 1]) if TENSOR in line else 1
