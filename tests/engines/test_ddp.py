"""Gradients in buckets: as many as asked for, laid out as DDP itself would, and without its complaints."""

import logging
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed import distributed_data_parallel as library

from megatron_sat.distributed import initialize_model_parallel
from megatron_sat.engines.ddp import wrap_chunks
from tests.helpers.plain_engine import make_engine, train
from tests.helpers.plain_gpt import make_chunks, make_config
from tests.helpers.ranks import run_ranks

LATE = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
KNOWS_NUMBER = "num_buckets" in DistributedDataParallelConfig.__dataclass_fields__


def places(ddp: DistributedDataParallel) -> list[dict[str, Any]]:
    """Where each parameter of a chunk lies in its buffers."""
    names = {parameter: name for name, parameter in ddp.module.named_parameters()}
    return [{names[p]: place for p, place in buffer.param_index_map.items()} for buffer in ddp.buffers]


def ours_and_theirs(rank: int, settings: dict[str, Any], pp: int) -> tuple[Any, Any, list[str]]:
    """The layout of our DDP and of the library's left alone, and what the library logs while ours is built."""
    virtual = 2 if pp > 1 else None
    initialize_model_parallel(tp=1, pp=pp, cp=1, virtual_pp=virtual, seed=1)
    model = make_config()
    logged: list[str] = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    library.logger.addHandler(handler)
    ours = wrap_chunks(
        make_chunks(model), config=model, ddp_config=DistributedDataParallelConfig(**settings), one_bucket=False
    )
    library.logger.removeHandler(handler)
    theirs = [
        DistributedDataParallel(model, DistributedDataParallelConfig(**settings), chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(make_chunks(model))
    ]
    return [places(d) for d in ours], [places(d) for d in theirs], logged


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"overlap_grad_reduce": True},
        {"overlap_grad_reduce": True, "bucket_size": 3000},
        {"use_distributed_optimizer": True},
        LATE,
        {**LATE, "bucket_size": 3000},
    ],
)
def test_parameters_lie_where_the_library_would_lay_them(settings: dict[str, Any], pp: int) -> None:
    for ours, theirs, logged in run_ranks(ours_and_theirs, 2, settings, pp):
        assert ours == theirs
        assert logged == []


def buckets(rank: int, count: int) -> tuple[int, float]:
    engine, layout = make_engine(ddp={**LATE, "num_buckets": count})
    return len(engine._wrapped[0].buffers[0].buckets), train(engine, layout, steps=range(2))[-1][0]


@pytest.mark.skipif(not KNOWS_NUMBER, reason="megatron-core 0.16.1 has no number of buckets")
def test_a_number_of_buckets_is_nearly_kept_and_changes_no_loss() -> None:
    one, few = run_ranks(buckets, 2, 1)[0], run_ranks(buckets, 2, 4)[0]
    assert one[0] == 1
    assert 3 <= few[0] <= 5  # a parameter is never cut
    assert few[1] == pytest.approx(one[1], abs=2e-6)
