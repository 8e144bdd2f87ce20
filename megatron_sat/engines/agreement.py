"""Whether all replicas speak of the same entries, before anything that rests on it is used.

Replicas that share a choice compute it from the same sums and weights, so they agree; on GPUs of different kinds, or
on a broken one, they may not, and sums of packed gradients would then silently be of different rows. A number that
stands for all entries is compared on the device. The host reads the outcome when it has to wait for the device anyway.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement:
    """Of the ranks of one group, in the step under way."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._asked: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def forget(self) -> None:
        """A new step begins."""
        self._asked.clear()

    def ask(self, indices: Sequence[Tensor]) -> None:
        """Compare these (int64, at least one, in the same order on every rank). Does not wait for the device."""
        number = stamp(indices)
        extremes = torch.stack([number, ~number])  # ~ turns the order round and, unlike -, has no overflow
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group)
        if not extremes.is_cuda:
            self._asked.append((extremes, None))
            return
        there = torch.empty_like(extremes, device="cpu", pin_memory=True)
        there.copy_(extremes, non_blocking=True)
        self._asked.append((there, torch.cuda.current_stream().record_event()))

    def check(self) -> None:
        """Raise RuntimeError where ranks differ in what has been asked so far. Waits until the device has compared."""
        for extremes, event in self._asked:
            if event is not None:
                event.synchronize()
            largest, inverted = extremes.tolist()
            if largest != ~inverted:
                raise RuntimeError(
                    "--sat-sparse-reduce needs replicas that keep the same neurons, got different ones in this step, "
                    "which is not updated; leave it out, or let all replicas run on GPUs of one kind"
                )
        self._asked.clear()


def stamp(indices: Sequence[Tensor]) -> Tensor:
    """[] int64: a number that depends on every index and its place, modulo 2^64."""
    together = torch.cat(list(indices))
    places = torch.arange(together.numel(), device=together.device)
    mixed = (together + 1) * _ODD[0] + places * _ODD[1]
    return ((mixed ^ (mixed >> 31)) * _ODD[2]).sum()


_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""Multipliers that spread bits: of splitmix64, as signed numbers."""
