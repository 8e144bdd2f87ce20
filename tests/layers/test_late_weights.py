"""Choices under --overlap-param-gather: replicas choose alike, as where every weight is there before."""

from fractions import Fraction
from typing import Any

import pytest

from megatron_sat.layers.attach import attach_selectors
from megatron_sat.sparsity.controller import Controller, sparse_modules
from megatron_sat.sparsity.schedule import ScheduleConfig, build_schedule
from megatron_sat.sparsity.selector import SelectionConfig
from tests.helpers.plain_engine import MICRO_BATCHES, batches_of, make_engine
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_chunks

LATE = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LATE |= {"bucket_size": 4000}  # several buckets, so that some arrive late


def choices(rank: int, ddp: dict[str, Any], settings: dict[str, str]) -> list[dict[str, list[int]]]:
    engine, layout = make_engine(build=tiny_chunks, ddp=ddp, rate={"lr": 3e-2, "min_lr": 3e-2})
    attach_selectors(engine.chunks, config=SelectionConfig(selection="top-k", **settings), layout=layout)
    schedule = build_schedule(ScheduleConfig(kind="constant", omission_rate=Fraction(1, 2), train_iters=6))
    controller = Controller(sparse_modules(engine.chunks), schedule=schedule, interval=1)
    kept = []
    for step in range(1, 7):
        with controller.step(step):
            engine.train_step(batches_of(step, layout), num_micro_batches=MICRO_BATCHES // layout.dp_size)
            kept.append({name: choice.index.tolist() for name, choice in controller.kept().items() if choice})
    return kept


@pytest.mark.parametrize("statistics", ["fresh", "lagged"])
@pytest.mark.parametrize("importance", ["magnitude", "maxip", "contribution"])
def test_replicas_choose_alike_while_weights_are_gathered(importance: str, statistics: str) -> None:
    settings = {"importance": importance, "statistics": statistics}
    late, plain = (run_ranks(choices, 2, ddp, settings) for ddp in (LATE, {}))

    assert late[0] == late[1] == plain[0]
