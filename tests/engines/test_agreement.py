"""A number for all entries: equal where they are, and different where one is, or lies elsewhere."""

from itertools import chain

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_sat.engines.agreement import Agreement, stamp
from tests.helpers.ranks import run_ranks

INDICES = st.lists(st.lists(st.integers(0, 30_000), max_size=5), min_size=1, max_size=4)


def tensors(indices: list[list[int]]) -> list[Tensor]:
    return [torch.tensor(index, dtype=torch.int64) for index in indices]


@given(one=INDICES, other=INDICES)
def test_two_choices_have_one_stamp_exactly_if_they_are_the_same(one: list[list[int]], other: list[list[int]]) -> None:
    same = list(chain(*one)) == list(chain(*other))
    assert bool(stamp(tensors(one)) == stamp(tensors(other))) == same


def test_a_stamp_of_many_indices_overflows_without_an_error() -> None:
    many = torch.arange(3_000_000)
    other = many.clone()
    other[1_234_567] += 1
    assert stamp([many]) != stamp([other])


def three(rank: int, odd: int | None) -> list[str]:
    """What is said after each of two questions; on rank ``odd`` the second one differs."""
    agreement, said = Agreement(dist.group.WORLD), []
    for question in range(2):
        index = torch.arange(5) + (100 if question and rank == odd else 0)
        agreement.ask([index, index + 7])
        try:
            agreement.check()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_every_rank_hears_that_one_differs() -> None:
    for said in run_ranks(three, 3, 1):
        assert said[0] == ""
        assert said[1].startswith("--sat-sparse-reduce needs replicas that keep the same neurons, got different ones")


def test_ranks_that_agree_hear_nothing() -> None:
    assert run_ranks(three, 3, None) == [["", ""]] * 3
