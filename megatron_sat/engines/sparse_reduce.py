"""Gradient reduction without the zeros that all replicas have in the same places.

megatron.core's DDP reduces whole buckets of a contiguous gradient buffer. Where some rows or columns of a parameter
are exact zeros on every replica, their sum is known: `SparseReduction` packs the others, sends those, and puts the sums
back. Everything around the collective is Megatron's: buckets, hooks, the check for NaN, the scale, when a bucket is
ready. A bucket of which nothing is known goes Megatron's way altogether.

Without a distributed optimizer the packed elements are all-reduced; long stretches without zeros, where they lie. With
one, each rank needs the sums of its own shard alone, and shards hold different numbers of packed elements, where a
reduce-scatter wants equal ones. Where they differ little, the smaller are padded. Else the packed elements are cut into
equal chunks wherever that falls, reduce-scattered, and the sums, 1/n of what was packed, go to their owners in one
exchange. Of the other shards a rank keeps its own gradients, as with Megatron's reduce-scatter.

What is equal to the full reduction, and why. The same n numbers are added for each element, so only the order of the
additions can differ. Two replicas: bit-equal, a + b is b + a. More: a ring adds in an order that depends on where in
the buffer an element lies, and packing moves it, so sums are equal where the additions are exact and else differ in
their last bits, as they do between two bucket sizes. The order is the same in each run, so a resumed run equals an
uninterrupted one.

All replicas must speak of the same entries; `Agreement` compares them in each step, before an update rests on them.

On a GPU, packing and unpacking have a stream of their own where Megatron overlaps reduction and backward.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor

from megatron_sat.engines.agreement import Agreement
from megatron_sat.engines.base import Batch, Filled, Forward
from megatron_sat.engines.filled import FilledEntries
from megatron_sat.engines.parcels import Parcel, bundles, pack, sections_of, unpack

ROUND = 1 << 25
"""Elements that are packed at a time: what this costs in memory is a few times as many, however large a bucket is."""
LONG = 1 << 20
"""Elements from which on a stretch without zeros is all-reduced in its place: copying it costs more than a call."""
PADDING = 1.05
"""Owners' parts are padded to the largest where this makes a round at most so many times as large."""

_Finish = Callable[[], object]
_Start = Callable[[], _Finish]
"""A round: starts to send, and gives what waits for it and puts the sums in place."""


def bytes_beside(ranks: int, *, itemsize: int) -> int:
    """The most that lies beside the gradients for a while: two rounds, packed, and what comes back to an owner.

    ranks: replicas. itemsize: bytes of a gradient's element.
    """
    return math.ceil(2 * ROUND * itemsize * (PADDING + 2 / ranks))


class SparseReduction:
    """Takes over the reductions of some model chunks.

    chunks: in megatron.core's DDP; its bucket groups' ``start_grad_sync`` is replaced.
    entries: asked after each chunk's first forward of a step; see `Filled`.
    round_elements: see `ROUND`.
    Raises ValueError for settings of DDP under which what is reduced is not a sum in the gradient buffer.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        *,
        entries: Callable[[], Iterable[Filled]],
        round_elements: int = ROUND,
    ) -> None:
        self._entries = entries
        self._ran: set[torch.nn.Module] = set()
        stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        groups = [
            _Group(group, stream=stream, round_elements=round_elements)
            for chunk in chunks
            for group in _checked(chunk).bucket_groups + chunk.expert_parallel_bucket_groups
        ]
        self._filled = FilledEntries(section for group in groups for section in group.sections)
        self._agreement = Agreement(groups[0].ranks)
        for group in groups:
            group.take_over(self._filled, agreement=self._agreement)

    def begin_step(self) -> None:
        """Nothing is known yet."""
        self._ran.clear()
        self._filled.forget()
        self._agreement.forget()

    def learn(self) -> None:
        """Ask for the entries that are known by now; what none is known of is reduced whole."""
        indices = self._filled.learn(self._entries())
        if indices:
            self._agreement.ask(indices)

    def check(self) -> None:
        """After a step's backward: raise RuntimeError where replicas were told of different entries."""
        self._agreement.check()

    def watching(self, forward: Forward) -> Forward:
        """The same forward, after whose first call for each chunk the entries are asked for."""

        def watched(chunk: torch.nn.Module, batch: Batch) -> Tensor:
            output = forward(chunk, batch)
            if chunk not in self._ran:
                self._ran.add(chunk)
                self.learn()
            return output

        return watched


def _checked(chunk: DistributedDataParallel) -> DistributedDataParallel:
    """The chunk, if what its DDP reduces are sums in its buffers."""
    config: DistributedDataParallelConfig = chunk.ddp_config
    instances = config.num_distributed_optimizer_instances
    found = (
        (config.average_in_collective, "sums that are divided beforehand, got --ddp-average-in-collective"),
        (
            config.reduce_scatter_with_fp32_accumulation,
            "Megatron's usual reduce-scatter, got --ddp-reduce-scatter-with-fp32-accumulation",
        ),
        (instances > 1, f"--num-distributed-optimizer-instances 1, got {instances}"),
        (
            bool(getattr(config, "param_name_patterns_for_fp32_local_accumulation", ())),  # from 0.17 on
            "gradients that add up in DDP's buffers, got --ddp-param-name-patterns-for-fp32-local-accumulation",
        ),
    )
    for wrong, need in found:
        if wrong:
            raise ValueError(f"--sat-sparse-reduce needs {need}; leave one of them out")
    return chunk


class _Group:
    """One of DDP's bucket groups."""

    def __init__(self, group: Any, *, stream: torch.cuda.Stream | None, round_elements: int) -> None:
        self._group, self._stream, self._most = group, stream, round_elements
        self._megatrons = group.start_grad_sync
        self._sharded = group.ddp_config.use_distributed_optimizer
        self.ranks: dist.ProcessGroup = (
            group.intra_distributed_optimizer_instance_group if self._sharded else group.data_parallel_group
        )
        owners = self.ranks.size() if self._sharded else 1
        self._buckets = [
            sections_of(bucket.grad_data, bucket.params_list, owners=owners) for bucket in group.buckets
        ]
        self.sections = [section for owned in self._buckets for section in chain(*owned)]

    def take_over(self, filled: FilledEntries, *, agreement: Agreement) -> None:
        """From now on reduce what is filled."""
        self._filled, self._agreement = filled, agreement
        self._group.start_grad_sync = self._start

    @torch.no_grad()
    def _start(self, force_all_reduce: bool | None = False) -> None:
        """In place of ``_ParamAndGradBucketGroup.start_grad_sync`` (0.16.1, 0.19), and as that does it: gradients are
        complete; without overlap they are reduced on return, else after ``grad_reduce_handle.wait()``."""
        group, config = self._group, self._group.ddp_config
        if force_all_reduce or not any(parameter in self._filled for parameter in group.params):
            self._megatrons(force_all_reduce=force_all_reduce)
            return
        if group.is_first_batch and group.grad_reduce_handle is not None:
            return  # sent already
        assert group.grad_reduce_handle is None, "a reduction begins before the last one has ended"
        if config.check_for_nan_in_grad or config.check_for_large_grads:
            group.check_grads(
                check_for_nan_or_inf=config.check_for_nan_in_grad, check_for_large=config.check_for_large_grads
            )
        for bucket in group.buckets:
            if bucket.gradient_scaling_factor != 1.0:
                bucket.grad_data *= bucket.gradient_scaling_factor
        if not config.overlap_grad_reduce:
            self._reduce()
        elif self._stream is None:
            self._reduce()
            group.grad_reduce_handle = _Done()
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._reduce()
            group.grad_reduce_handle = self._stream.record_event()

    def _reduce(self) -> None:
        """All rounds, each packed while the one before it is on its way."""
        finish: _Finish | None = None
        for start in self._rounds():
            following = start()
            if finish is not None:
                finish()
            finish = following
        if finish is not None:
            finish()

    def _rounds(self) -> Iterator[_Start]:
        if self._sharded:
            self._agreement.check()  # now: ranks that send different numbers would wait for each other for ever
        for owned in self._buckets:
            parcels = [[self._filled.parcel(section) for section in sections] for sections in owned]
            if self._sharded:
                yield from _rounds_for_owners(parcels, most=self._most, group=self.ranks)
            else:
                yield from _rounds_for_all(parcels[0], most=self._most, group=self.ranks)


class _Done:
    """The handle of what has been waited for."""

    def wait(self) -> None:
        """Nothing is left to wait for."""


def _rounds_for_all(parcels: Iterable[Parcel], *, most: int, group: dist.ProcessGroup) -> Iterator[_Start]:
    """Every rank gets the sums."""
    packed = []
    for parcel in parcels:
        if parcel.index is None and parcel.numel >= LONG:
            yield partial(_sum_in_place, parcel, group=group)
        else:
            packed.append(parcel)
    for bundle in bundles(packed, most=most):
        yield partial(_sum_packed, bundle, group=group)


def _sum_in_place(parcel: Parcel, *, group: dist.ProcessGroup) -> _Finish:
    return _begun(dist.all_reduce, parcel.grid, group=group).wait


def _sum_packed(bundle: Sequence[Parcel], *, group: dist.ProcessGroup) -> _Finish:
    packed = bundle[0].grid.new_empty(_numel(bundle))
    pack(bundle, packed)
    work = _begun(dist.all_reduce, packed, group=group)

    def finish() -> None:
        work.wait()
        unpack(bundle, packed)

    return finish


def _rounds_for_owners(
    parcels: Sequence[Sequence[Parcel]], *, most: int, group: dist.ProcessGroup
) -> Iterator[_Start]:
    """Each rank gets the sums of its own parcels. parcels: by owner."""
    owned = [list(bundles(each, most=max(1, most // group.size()))) for each in parcels]
    for together in zip_longest(*owned, fillvalue=()):
        yield partial(_sum_at_owners, together, group=group)


def _sum_at_owners(together: Sequence[Sequence[Parcel]], *, group: dist.ProcessGroup) -> _Finish:
    """together: a bundle for each rank, of which at least one is not empty."""
    sizes = [_numel(bundle) for bundle in together]
    rank, ranks, chunk = group.rank(), group.size(), max(sizes)
    padded = ranks * chunk <= PADDING * sum(sizes)
    if not padded:
        chunk = -(-sum(sizes) // ranks)
    starts = [owner * chunk for owner in range(ranks)] if padded else [0, *accumulate(sizes[:-1])]
    packed = next(parcel for bundle in together for parcel in bundle).grid.new_empty(ranks * chunk)
    for bundle, start, size in zip(together, starts, sizes, strict=True):
        pack(bundle, packed[start : start + size])
    sums = packed.new_empty(chunk)
    work = _begun(dist.reduce_scatter_tensor, sums, packed, group=group)

    def finish() -> None:
        work.wait()
        unpack(together[rank], sums[: sizes[rank]] if padded else _to_owners(sums, sizes=sizes, group=group))

    return finish


def _to_owners(sums: Tensor, *, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """sums: [chunk], this rank's of the equal chunks. Returns those it owns, [sizes[rank]]."""
    rank = group.rank()
    moves = overlaps(sizes, chunk=sums.numel())
    sent, received = moves[rank], [row[rank] for row in moves]
    own = sums.new_empty(sizes[rank])
    _begun(dist.all_to_all_single, own, sums[: sum(sent)], received, sent, group=group).wait()
    return own


def overlaps(sizes: Sequence[int], *, chunk: int) -> list[list[int]]:
    """Of elements that lie in a row: [chunk][owner], how many of each chunk belong to each owner.

    sizes: of what the owners have, in that order. chunk: size of as many equal chunks; the last may reach too far.
    """
    ends = list(pairwise((0, *accumulate(sizes))))
    return [
        [max(0, min(last, (number + 1) * chunk) - max(first, number * chunk)) for first, last in ends]
        for number in range(len(sizes))
    ]


def _begun(collective: Callable[..., Any], *args: Any, group: dist.ProcessGroup) -> Any:
    """The handle of a collective under way; gloo's are waited for where they start, as all of them are (`faults`)."""
    work = collective(*args, group=group, async_op=args[0].is_cuda)
    return _Done() if work is None else work


def _numel(bundle: Sequence[Parcel]) -> int:
    return sum(parcel.numel for parcel in bundle)
