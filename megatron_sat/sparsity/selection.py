"""From scores and a rate to the neurons that are kept (eq. 8): counts, top-k, sampling without replacement.

Selection is by quota: the units lie in equal groups, and every group keeps the same number. Groups never
cross a TP rank, so each rank can choose its own part alone, and with as many groups the choice is the same at
any TP size.
"""

import hashlib
import math
from fractions import Fraction

import torch
from torch import Tensor


def keep_count(total: int, rate: Fraction, *, multiple: int = 1) -> int:
    """How many of ``total`` units stay: ⌊total (1 - rate)⌋ floored to ``multiple``, at least one of it.

    Exact: rates are fractions, so no rung keeps one too many. At rate 0 all stay, whatever the multiple.
    Raises ValueError where the rate is outside [0, 1), or one ``multiple`` is more than ``total``.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"omission rate must be in [0, 1), got {rate}; 0 is dense")
    if not 1 <= multiple <= total:
        raise ValueError(
            f"the multiple of kept units must be between 1 and the units of a selection group ({total}), "
            f"got {multiple}; lower --sat-channel-multiple or --sat-selection-groups"
        )
    if rate == 0:
        return total
    return max(math.floor(total * (1 - rate) / multiple), 1) * multiple


def generator_of(key: str) -> torch.Generator:
    """A CPU generator for a text: the same on every rank and machine."""
    # torch's CPU generator reads 32 bits of a seed and drops the others
    seed = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "little"))


def uniform_draw(total: int, *, seed: int, step: int, layer: int, kind: str) -> Tensor:
    """[total] fp64 in (0, 1) on the CPU, a function of the arguments alone: alike on all ranks and machines.

    Drawn for the whole layer; a rank takes its slice, so a neuron's number does not depend on TP.
    """
    generator = generator_of(f"{seed}/{step}/{layer}/{kind}")
    uniform = torch.rand(total, generator=generator, dtype=torch.float64)
    return uniform.clamp_(min=torch.finfo(torch.float64).tiny)  # log(0), once in 2^53


def gumbel(uniform: Tensor, *, device: torch.device | None = None) -> Tensor:
    """Standard Gumbel variates, fp32 on ``device``, of uniform ones, fp64 on the CPU.

    The two logarithms are the device's own, in fp64, and so equal but for a last bit that the rounding takes away.
    """
    if device is not None and device.type == "cuda":
        # from pinned memory the copy waits for nothing; a CPU's logs, on 16 threads, took 4 ms a layer (H100 machine)
        uniform = uniform.pin_memory().to(device, non_blocking=True)
    return -torch.log(-torch.log(uniform)).float()


def select(scores: Tensor, *, groups: int, keep: int, noise: Tensor | None, temperature: float) -> Tensor:
    """The ``keep`` best of each of ``groups`` equal runs of ``scores``.

    scores: [units] fp32. noise: [units] for sampling: the top-k of scores / temperature + Gumbel noise is a
    sample without replacement from softmax(scores / temperature) (eq. 8); None for plain top-k, where the
    temperature plays no part. Returns [groups * keep] int64, ascending. Equal scores go to the lower index.
    """
    keys = scores if noise is None else scores / temperature + noise
    keys = keys.view(groups, -1)
    best = torch.sort(keys, dim=1, descending=True, stable=True).indices[:, :keep].sort(dim=1).values
    first = torch.arange(groups, device=keys.device)[:, None] * keys.size(1)
    return (best + first).flatten()
