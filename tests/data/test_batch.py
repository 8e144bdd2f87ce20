"""Micro-batches: every sample once, the same order after a resume at any data-parallel size, exact cuts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from megatron_sat.data.batch import (
    FIELDS,
    EvaluationBatches,
    MicroBatchSampler,
    build_train_iterator,
    cut_for_context_parallel,
)

CPU = torch.device("cpu")


class Numbers(Dataset):
    """Sample i is full of i; one more field, as a blend has."""

    def __init__(self, size: int, length: int = 4) -> None:
        self.size, self.length = size, length

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(index)
        full = torch.full((self.length,), index)
        return {
            "dataset_id": 3,
            "tokens": full,
            "labels": full + 1,
            "loss_mask": torch.ones(self.length),
            "position_ids": torch.arange(self.length),
        }


def sampler(size: int = 100, *, mbs: int = 2, rank: int = 0, dp: int = 1, consumed: int = 0) -> MicroBatchSampler:
    return MicroBatchSampler(size, micro_batch_size=mbs, dp_rank=rank, dp_size=dp, consumed_samples=consumed)


def iterate(dataset: Dataset, **changed: object):
    arguments = {"micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, "consumed_samples": 0, "num_workers": 0}
    return build_train_iterator(dataset, device=CPU, **(arguments | changed))


@given(size=st.integers(0, 60), mbs=st.integers(1, 4), dp=st.integers(1, 4), consumed=st.integers(0, 70))
def test_the_ranks_together_see_the_sequence_from_where_it_was(size, mbs, dp, consumed):
    ranks = [list(sampler(size, mbs=mbs, rank=rank, dp=dp, consumed=consumed)) for rank in range(dp)]
    dealt = [index for step in zip(*ranks, strict=True) for part in step for index in part]
    whole = max(0, size - consumed) // (mbs * dp) * mbs * dp
    assert dealt == list(range(consumed, consumed + whole))
    assert [len(sampler(size, mbs=mbs, rank=rank, dp=dp, consumed=consumed)) for rank in range(dp)] == [
        len(r) for r in ranks
    ]


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_resuming_gives_the_tail(steps):
    whole = [list(sampler(rank=rank, dp=2)) for rank in range(2)]
    resumed = [list(sampler(rank=rank, dp=2, consumed=steps * 4)) for rank in range(2)]
    assert resumed == [batches[steps:] for batches in whole]


def test_a_global_batch_has_the_same_samples_at_any_data_parallel_size():
    def second_global_batch(dp: int, mbs: int) -> set[int]:
        micro_batches = 12 // (mbs * dp)
        ranks = [list(sampler(mbs=mbs, rank=rank, dp=dp, consumed=12))[:micro_batches] for rank in range(dp)]
        return {index for rank in ranks for batch in rank for index in batch}

    assert all(
        second_global_batch(dp, mbs) == set(range(12, 24)) for dp, mbs in [(1, 2), (2, 3), (3, 2), (6, 1), (1, 12)]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_have_the_fields_of_training_and_nothing_else(workers):
    batches = list(iterate(Numbers(10), dp_rank=1, dp_size=2, num_workers=workers))
    assert [batch["tokens"][:, 0].tolist() for batch in batches] == [[2, 3], [6, 7]]
    assert tuple(batches[0]) == FIELDS
    assert {name: (tuple(field.shape), field.dtype) for name, field in batches[0].items()} == {
        "tokens": ((2, 4), torch.int64),
        "labels": ((2, 4), torch.int64),
        "loss_mask": ((2, 4), torch.float32),
        "position_ids": ((2, 4), torch.int64),
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_models_random_numbers_alone(workers):
    before = torch.get_rng_state()
    list(iterate(Numbers(6), num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("consumed", [99, 100, 250])
def test_a_data_set_that_is_used_up_is_refused(consumed):
    with pytest.raises(ValueError, match=rf"consumed_samples \({consumed}\) must leave 2 of the 100 training samples"):
        iterate(Numbers(100), consumed_samples=consumed)


def evaluation(
    size: int, *, rank: int, dp: int, mbs: int = 3, limit: int | None = None, multiple: int = 1
) -> EvaluationBatches:
    return EvaluationBatches(
        Numbers(size),
        micro_batch_size=mbs,
        dp_rank=rank,
        dp_size=dp,
        max_samples=limit,
        num_workers=0,
        device=CPU,
        multiple=multiple,
    )


@pytest.mark.parametrize(
    "size, limit, counted", [(10, None, 10), (12, None, 12), (50, 7, 7), (1, None, 1), (5, 100, 5)]
)
@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 3])
def test_an_evaluation_counts_every_sample_once_and_all_ranks_step_alike(size, limit, counted, dp, multiple):
    ranks = [evaluation(size, rank=rank, dp=dp, limit=limit, multiple=multiple) for rank in range(dp)]
    seen = []
    for batches in ranks:
        for batch in batches:
            seen += batch["tokens"][batch["loss_mask"].bool()].tolist()
    assert sorted(seen) == [index for index in range(counted) for _ in range(4)]
    assert (
        {len(batches) for batches in ranks}
        == {len(list(batches)) for batches in ranks}
        == {-(-counted // (3 * dp * multiple)) * multiple}
    )


def test_an_evaluation_repeats_itself():
    batches = evaluation(10, rank=0, dp=1)
    first, second = list(batches), list(batches)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(first, second, strict=True))


def test_an_evaluation_without_samples_is_refused():
    with pytest.raises(ValueError, match="an evaluation must have at least one sample, got 0; raise --eval-iters"):
        evaluation(10, rank=0, dp=1, limit=0)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_context_parallel_ranks_together_hold_every_position_once(size):
    batch = {"tokens": torch.arange(48).view(2, 24), "loss_mask": torch.rand(2, 24)}
    parts = [cut_for_context_parallel(batch, cp_rank=rank, cp_size=size) for rank in range(size)]
    assert all(part["tokens"].shape == (2, 24 // size) for part in parts)
    for row in range(2):
        together = [index for part in parts for index in part["tokens"][row].tolist()]
        assert sorted(together) == batch["tokens"][row].tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_each_context_parallel_rank_has_an_early_and_a_late_chunk(size):
    positions = torch.arange(16 * size)[None]
    for rank in range(size):
        part = cut_for_context_parallel({"x": positions}, cp_rank=rank, cp_size=size)["x"][0].tolist()
        early = list(range(8 * rank, 8 * rank + 8))
        late = list(range(16 * size - 8 * rank - 8, 16 * size - 8 * rank))
        assert part == early + late


def test_without_context_parallelism_the_batch_is_whole():
    batch = {"x": torch.arange(7)[None]}
    assert cut_for_context_parallel(batch, cp_rank=0, cp_size=1) is batch


@pytest.mark.parametrize("length, way_out", [(10, 8), (3, 4)])
def test_a_length_that_cannot_be_cut_is_refused(length, way_out):
    with pytest.raises(
        ValueError,
        match=rf"seq_length \({length}\) must be a multiple of .* = 4; try --seq-length {way_out}$",
    ):
        cut_for_context_parallel({"x": torch.zeros(1, length)}, cp_rank=0, cp_size=2)
