"""Gradients without their zeros: two replicas train bit for bit as with the full reduction, and send less."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor
from torch.testing import assert_close

from benchmarks.wire import counted
from megatron_sat.engines import sparse_reduce
from megatron_sat.engines.base import Filled
from megatron_sat.engines.sparse_reduce import SparseReduction, overlaps
from tests.helpers.engine_state import named, snapshot
from tests.helpers.part import Part
from tests.helpers.plain_engine import bits, make_engine, train
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import RUN_LOSS, RUN_NORM

BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = {"overlap_grad_reduce": True, "bucket_size": 5000}
GATHERED = {**SHARDED, **OVERLAPPED, "overlap_param_gather": True}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "all-reduce": (2, {}),
    "all-reduce, overlapped": (2, {"ddp": OVERLAPPED}),
    "all-reduce, bf16 gradients": (2, {"model": BF16, "ddp": {"grad_reduce_in_fp32": False}}),
    "sharded": (2, {"ddp": SHARDED}),
    "sharded, overlapped": (2, {"ddp": GATHERED}),
    "sharded, bf16, overlapped": (2, {"model": BF16, "ddp": GATHERED}),
    "sharded, bf16 gradients": (2, {"model": BF16, "ddp": {**SHARDED, "grad_reduce_in_fp32": False}}),
    "sharded, averaged": (2, {"model": {"calculate_per_token_loss": False}, "ddp": SHARDED}),
    "sharded, checked for NaN": (2, {"ddp": {**SHARDED, "check_for_nan_in_grad": True}}),
    "sharded, TP 2 x DP 2, overlapped": (4, {"tp": 2, "ddp": GATHERED}),
    "all-reduce, PP 2 x DP 2, interleaved, overlapped": (
        4,
        {
            "pp": 2,
            "virtual_pp": 2,
            "model": {"overlap_p2p_comm": True, "batch_p2p_comm": False},
            "ddp": OVERLAPPED,
        },
    ),
}


class Run(NamedTuple):
    bits: dict[str, bytes]
    results: list[tuple[float, float]]
    bytes: list[int]
    """Of each step."""
    layers: int
    """Elements of the matrices that lose entries."""
    others: int
    itemsize: int


def run(settings: dict[str, Any], *, sparse: bool, steps: int = 3, dense: Iterable[int] = ()) -> Run:
    engine, layout = make_engine(**settings)
    part = Part(engine, dense=dense)
    if sparse:
        engine.reduce_only(part.entries)
    results, sent = [], []
    for step in range(steps):
        part.step = step
        with counted(engine._wrapped) as wire:
            results += train(engine, layout, steps=range(step, step + 1))
        sent.append(wire.bytes)
    sizes = [(p.numel(), Part.dim_of(n) is None) for n, p in named(engine)]
    return Run(
        bits=bits(snapshot(engine)),
        results=results,
        bytes=sent,
        layers=sum(size for size, other in sizes if not other),
        others=sum(size for size, other in sizes if other),
        itemsize=2 if settings.get("ddp", {}).get("grad_reduce_in_fp32") is False else 4,
    )


def both(_: int, settings: dict[str, Any]) -> tuple[Run, Run]:
    return run(settings, sparse=False), run(settings, sparse=True)


FAST = (
    "all-reduce, overlapped",
    "sharded, bf16, overlapped",
    "sharded, averaged",
    "sharded, checked for NaN",
    "sharded, TP 2 x DP 2, overlapped",
)


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FAST)) for c in CASES])
def test_two_replicas_train_bit_for_bit_as_with_the_full_reduction_and_send_half(case: str) -> None:
    ranks, settings = CASES[case]
    for full, sparse in run_ranks(both, ranks, settings):
        assert sparse.results == full.results
        assert sparse.bits == full.bits
        for sent, whole in zip(sparse.bytes, full.bytes, strict=True):
            assert whole >= full.itemsize * (full.layers + full.others)
            ratio = (sent / full.itemsize - full.others) / full.layers
            # of matrices as small as these the halves of a bucket keep very different shares: their ends are exchanged
            assert 0.49 <= ratio <= (0.57 if "sharded" in case else 0.51)


@pytest.mark.slow
@pytest.mark.parametrize("ddp", [OVERLAPPED, GATHERED], ids=["all-reduce", "sharded"])
def test_four_replicas_train_alike_but_for_the_order_of_additions(ddp: dict[str, Any]) -> None:
    for full, sparse in run_ranks(both, 4, {"ddp": ddp}):
        losses, norms = zip(*sparse.results, strict=True)
        assert_close(losses, tuple(loss for loss, _ in full.results), **RUN_LOSS)
        assert_close(norms, tuple(norm for _, norm in full.results), **RUN_NORM)


def rung_by_rung(_: int) -> tuple[Run, Run]:
    settings = {"ddp": GATHERED}
    return run(settings, sparse=False, dense=(1,)), run(settings, sparse=True, dense=(1,))


def test_a_dense_step_among_sparse_ones_goes_megatrons_way() -> None:
    for full, sparse in run_ranks(rung_by_rung, 2):
        assert sparse.bits == full.bits
        assert sparse.bytes[1] == full.bytes[1]
        assert sparse.bytes[2] < full.bytes[2]


# -- what is wrong shows


def lying(_: int, sharded: bool) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Entries that leave out a row which has a gradient."""
    found = []
    for sparse in (False, True):
        engine, layout = make_engine(ddp=SHARDED if sharded else {})
        weight = next(p for n, p in named(engine) if "linear_fc1" in n)
        entries: list[Filled] = [(weight, 0, torch.arange(1, weight.shape[0]))]
        if sparse:
            engine.reduce_only(lambda entries=entries: entries)  # type: ignore[misc]
        train(engine, layout, steps=range(2))
        found.append(bits(snapshot(engine)))
    return found[0], found[1]


@pytest.mark.parametrize("sharded", [False, True])
def test_an_entry_that_is_kept_from_the_reduction_though_it_is_filled_is_seen(sharded: bool) -> None:
    assert any(full != sparse for full, sparse in run_ranks(lying, 2, sharded))


def poisoned(_: int) -> None:
    engine, layout = make_engine(ddp={**SHARDED, "check_for_nan_in_grad": True})
    part = Part(engine)
    engine.reduce_only(part.entries)
    norm = next(p for n, p in named(engine) if "final_layernorm" in n)
    norm.register_hook(lambda gradient: gradient * torch.nan)
    train(engine, layout, steps=range(1))


def test_megatrons_check_sees_a_gradient_that_is_no_number_before_it_is_packed() -> None:
    with pytest.raises(RuntimeError, match="found NaN in local grad norm for bucket #0"):
        run_ranks(poisoned, 2)


def apart(rank: int, sharded: bool) -> None:
    """Replicas that are told of different rows; with shards, of different numbers of rows in each."""
    engine, layout = make_engine(ddp={**(SHARDED if sharded else {}), **OVERLAPPED})
    part = Part(engine)
    engine.reduce_only(part.entries)
    part.step = rank
    train(engine, layout, steps=range(1))


@pytest.mark.parametrize("sharded", [False, True])
def test_replicas_that_keep_different_neurons_are_an_error_before_the_update(sharded: bool) -> None:
    said = "--sat-sparse-reduce needs replicas that keep the same neurons, got different ones in this step"
    with pytest.raises(RuntimeError, match=said):
        run_ranks(apart, 2, sharded)


# -- one reduction, against sums that are exact


def exact(rank: int, sharded: bool) -> tuple[list[list[bool]], list[int]]:
    """By size of a round and gradient: whether its sums are those of all ranks, where this rank is to have them. Values
    are small whole numbers, whose sums do not depend on an order; what is not filled is zero. And: rounds there were,
    and how many ended with an exchange."""
    calls = [0, 0]

    def counting(function: Any, at: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[at] += 1
            return function(*args, **kwargs)

        return call

    sparse_reduce._sum_at_owners = counting(sparse_reduce._sum_at_owners, 0)
    sparse_reduce._to_owners = counting(sparse_reduce._to_owners, 1)
    return [summed(rank, sharded=sharded, most=most) for most in (100, 3000, 1 << 25)], calls


def summed(rank: int, *, sharded: bool, most: int) -> list[bool]:
    engine, _ = make_engine(ddp=SHARDED if sharded else {})
    part = Part(engine)
    (chunk,) = engine._wrapped
    reduction = SparseReduction(engine._wrapped, entries=part.entries, round_elements=most)
    reduction.begin_step()
    reduction.learn()
    entries = {parameter: (dim, index) for parameter, dim, index in part.entries()}
    mine: dict[torch.nn.Parameter, Tensor] = {}
    for seed, (_, parameter) in enumerate(named(engine)):
        generator = torch.Generator().manual_seed(100 * seed + rank)
        values = torch.randint(-8, 9, parameter.shape, generator=generator).float()
        if parameter in entries:
            dim, index = entries[parameter]
            values = torch.zeros_like(values).index_copy_(dim, index, values.index_select(dim, index))
        mine[parameter] = values
        parameter.main_grad.copy_(values)  # type: ignore[attr-defined]
    chunk.start_grad_sync()
    same = []
    for parameter, values in mine.items():
        total = values.clone()
        dist.all_reduce(total)
        reduced: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        buffer = chunk.buffers[0].grad_data
        shard = buffer.numel() // dist.get_world_size()
        at = torch.arange(parameter.numel()).view(parameter.shape) + reduced.storage_offset()
        here = at // shard == rank if sharded else torch.ones_like(at, dtype=torch.bool)
        same.append(bool((reduced[here] == total[here]).all()))
    return same


@pytest.mark.parametrize("sharded", [False, True])
def test_exact_sums_of_four_replicas_are_bit_equal_however_many_rounds_there_are(sharded: bool) -> None:
    for found, (rounds, exchanges) in run_ranks(exact, 4, sharded):
        assert all(len(same) > 20 and all(same) for same in found)
        assert 0 < exchanges < rounds if sharded else rounds == 0  # both ways to an owner are taken


@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any))
def test_each_element_of_equal_chunks_goes_to_the_one_that_owns_it(sizes: list[int]) -> None:
    owners = [owner for owner, size in enumerate(sizes) for _ in range(size)]
    chunk = -(-len(owners) // len(sizes))
    ranks = range(len(sizes))
    naive = [[owners[n * chunk : (n + 1) * chunk].count(owner) for owner in ranks] for n in ranks]
    assert overlaps(sizes, chunk=chunk) == naive


def in_place(_: int, longest: int) -> tuple[int, dict[str, bytes]]:
    sparse_reduce.LONG = longest
    engine, layout = make_engine()
    engine.reduce_only(Part(engine).entries)
    with counted(engine._wrapped) as wire:
        train(engine, layout, steps=range(1))
    return wire.calls, bits(snapshot(engine))


def test_long_stretches_without_zeros_are_reduced_where_they_lie_with_the_same_sums() -> None:
    packed, apart = run_ranks(in_place, 2, 1 << 20), run_ranks(in_place, 2, 2000)
    assert [calls for calls, _ in packed] == [1, 1]
    assert [calls for calls, _ in apart] == [3, 3]  # embedding and head
    assert packed[0][1] == apart[0][1]


def forced(_: int) -> tuple[int, int]:
    """Bytes of a reduction that is told to be an all-reduce, and of Megatron's buffer."""
    engine, _ = make_engine(ddp=SHARDED)
    part = Part(engine)
    engine.reduce_only(part.entries)
    assert engine._sparse_reduction is not None
    engine._sparse_reduction.learn()
    with counted(engine._wrapped) as wire:
        engine._wrapped[0].finish_grad_sync(force_all_reduce=True)
    return wire.bytes, engine._wrapped[0].buffers[0].grad_data.nbytes


def test_a_forced_all_reduce_is_megatrons_own() -> None:
    assert [sent == whole for sent, whole in run_ranks(forced, 2)] == [True, True]


# -- refusals


class _Like:
    """DDP's configuration of a chunk."""

    def __init__(self, **settings: Any) -> None:
        self.ddp_config = param_and_grad_buffer.DistributedDataParallelConfig(**settings)


LATE = "param_name_patterns_for_fp32_local_accumulation"
REFUSED = {
    "average_in_collective": (
        True,
        "--sat-sparse-reduce needs sums that are divided beforehand, got --ddp-average-in-collective; leave one",
    ),
    "reduce_scatter_with_fp32_accumulation": (
        True,
        "--sat-sparse-reduce needs Megatron's usual reduce-scatter, got --ddp-reduce-scatter-with-fp32-accumulation;",
    ),
    "num_distributed_optimizer_instances": (
        2,
        "--sat-sparse-reduce needs --num-distributed-optimizer-instances 1, got 2; leave one of them out",
    ),
    LATE: (
        ("weight",),
        "--sat-sparse-reduce needs gradients that add up in DDP's buffers, got --ddp-param-name-patterns-for-fp32-",
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_settings_under_which_no_sum_in_the_buffer_is_reduced_are_refused(key: str) -> None:
    value, said = REFUSED[key]
    chunk = _Like() if key == LATE else _Like(**{key: value})
    if key == LATE:
        setattr(chunk.ddp_config, key, value)  # 0.16.1 does not know it
    chunks: Any = [chunk]
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        SparseReduction(chunks, entries=list)
