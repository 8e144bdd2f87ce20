"""Clusters that cannot be, and what tensor parallelism costs on a narrow NVLink."""

import re
from typing import Any

import pytest

from megatron_sat.model.flops import ModelShape
from megatron_sat.rehearsal.cluster import GPUS, Cluster, remarks, tensor_parallel_cost
from megatron_sat.rehearsal.memory import GIB

LLAMA_7B = ModelShape(
    num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=32, kv_channels=128,
    ffn_hidden_size=11008, gated=True, padded_vocab_size=32000, seq_length=4096,
)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gpu": "v100"}, "--gpu must be one of a100, a100-40g, a800, h100, h200, h800, got v100"),
        ({"world_size": 0}, "--world-size must be at least 1, got 0"),
        ({"per_host": 0}, "--gpus-per-host must be at least 1, got 0"),
        ({"world_size": 12}, "--gpus-per-host (8) must divide --world-size (12)"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Cluster(**{"gpu": "a100", "world_size": 32} | fields)


@pytest.mark.parametrize(("world_size", "hosts"), [(4, 1), (8, 1), (32, 4)])
def test_hosts_follow_from_the_ranks(world_size: int, hosts: int) -> None:
    assert Cluster(gpu="h100", world_size=world_size).hosts == hosts


def test_an_estimate_must_leave_room() -> None:
    cluster = Cluster(gpu="a800", world_size=8)
    assert cluster.usable / GIB == pytest.approx(79.2 * 0.92)


def test_the_cost_of_tensor_parallelism_is_that_of_the_sums_over_that_of_the_products() -> None:
    """A layer of 7B over 2 A800, by token: 4 sums of 8 KiB, each sent once, at 200 GB/s; products at 156 TFLOP/s."""
    sums = 4 * 4096 * 2 / 200e9
    products = 6 * (4 * 4096 * 4096 + 3 * 4096 * 11008) / 2 / 156e12
    found = tensor_parallel_cost(LLAMA_7B, tensor=2, gpu=GPUS["a800"])
    assert found == pytest.approx(sums / products)
    assert tensor_parallel_cost(LLAMA_7B, tensor=1, gpu=GPUS["a800"]) == 0.0


def test_it_grows_with_the_ranks_a_narrow_link_and_what_is_left_out() -> None:
    a800 = tensor_parallel_cost(LLAMA_7B, tensor=8, gpu=GPUS["a800"])
    assert a800 > tensor_parallel_cost(LLAMA_7B, tensor=4, gpu=GPUS["a800"])
    assert a800 == pytest.approx(1.5 * tensor_parallel_cost(LLAMA_7B, tensor=8, gpu=GPUS["a100"]))
    assert tensor_parallel_cost(LLAMA_7B, tensor=8, gpu=GPUS["a800"], kept=0.5) == pytest.approx(2 * a800)


def said_of(tensor: int, gpu: str, *, per_host: int = 8) -> list[str]:
    cluster = Cluster(gpu=gpu, world_size=32, per_host=per_host)
    return remarks(cluster, LLAMA_7B, tensor=tensor, least_kept=0.5)


def test_a_reader_is_warned_of_sums_that_eat_what_sparsity_saves() -> None:
    assert said_of(1, "a800") == []
    (fine,) = said_of(2, "a800")
    assert fine.startswith("tensor parallelism over 2: its sums take about")
    (bad,) = said_of(8, "a800")
    assert bad.startswith("warning: tensor parallelism over 8: its sums take about")
    assert "less tensor and more pipeline parallelism" in bad
    (outside,) = said_of(8, "a800", per_host=4)
    assert outside == (
        "warning: tensor parallelism over 8 ranks leaves a host of 4 and its NVLink; use "
        "--pipeline-model-parallel-size for the rest"
    )
