"""Replicas: they choose alike, and together they are one process with all their texts."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import FP32_SUMS
from tests.hf.models import chosen, gradients, make_batch, make_model, make_sparse

Found = tuple[dict[str, list[int]], dict[str, Tensor]]
STEPS = (1, 2)


def replica(rank: int, *, packed: bool, **selection: Any) -> list[Found]:
    """By step this rank's choice and the reduced gradients, of two micro-batches of its own."""
    model = make_model("qwen2")
    sparse = make_sparse(model, selection="sampling", **selection)
    wrapped = DistributedDataParallel(model)
    found = []
    for step in STEPS:
        model.zero_grad()
        with sparse.step(step, micro_batches=2 if packed else None):
            for number in range(2):
                with wrapped.no_sync() if number == 0 else nullcontext():
                    wrapped(**make_batch(10 * step + 2 * number + rank)).loss.backward()
            found.append(({name: index.tolist() for name, index in chosen(sparse).items()}, gradients(model)))
    return found


def all_in_one(*, world: int = 2, **selection: Any) -> list[Found]:
    """The same steps in one process, each micro-batch that of all ranks."""
    model = make_model("qwen2")
    sparse = make_sparse(model, **selection)
    found = []
    for step in STEPS:
        model.zero_grad()
        with sparse.step(step):
            for number in range(2):
                parts = [make_batch(10 * step + 2 * number + rank) for rank in range(world)]
                model(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}).loss.backward()
            found.append(({name: index.tolist() for name, index in chosen(sparse).items()}, gradients(model)))
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["gathered", "packed"])
@pytest.mark.parametrize(
    "selection", [{}, {"importance": "contribution"}, {"importance": "wanda", "gqa": "head"}, {"statistics": "lagged"}]
)
def test_two_replicas_are_one_process_with_their_texts(selection: dict[str, Any], packed: bool) -> None:
    ranks, alone = run_ranks(replica, 2, packed=packed, **selection), all_in_one(**selection)
    for step in range(len(STEPS)):
        assert ranks[0][step][0] == ranks[1][step][0] == alone[step][0]
        assert_close(ranks[0][step][1], alone[step][1], **FP32_SUMS)
        assert_close(ranks[1][step][1], alone[step][1], **FP32_SUMS)


def test_local_replicas_choose_for_themselves() -> None:
    """The negative control of `shared`: their tokens differ, and so do their choices."""
    ranks = run_ranks(replica, 2, packed=True, dp_selection="local")
    assert ranks[0][0][0] != ranks[1][0][0]


def test_metrics_without_tokens_send_nothing() -> None:
    def choose(rank: int) -> bool:
        model = make_model()
        sparse = make_sparse(model, importance="magnitude")
        dist.all_reduce = None  # type: ignore[assignment]
        with sparse.step(1):
            model(**make_batch())
        return True

    assert run_ranks(choose, 2) == [True, True]
