"""What DeepSpeed is told of the groups: data parallelism is that of replicas and context, model parallelism TP."""

import torch.distributed as dist

from megatron_sat.distributed import initialize_model_parallel
from megatron_sat.engines.mpu import ModelParallelUnit
from tests.helpers.ranks import run_ranks


def told(rank: int, tp: int, cp: int) -> dict[str, object]:
    unit = ModelParallelUnit(initialize_model_parallel(tp=tp, pp=1, cp=cp, virtual_pp=None, seed=1))
    assert unit.get_model_parallel_group() is unit.get_tensor_model_parallel_group()
    assert dist.get_process_group_ranks(unit.get_data_parallel_group()) == unit.get_data_parallel_group_ranks()
    assert unit.get_pipeline_model_parallel_world_size() == 1 and unit.get_pipeline_model_parallel_rank() == 0
    return {
        "model": (unit.get_model_parallel_rank(), unit.get_model_parallel_world_size()),
        "tensor": (unit.get_tensor_model_parallel_rank(), unit.get_tensor_model_parallel_world_size()),
        "source": unit.get_tensor_model_parallel_src_rank(),
        "data": (unit.get_data_parallel_rank(), unit.get_data_parallel_world_size()),
        "replicas": unit.get_data_parallel_group_ranks(),
        "ulysses": hasattr(unit, "initialize_sequence_parallel") or hasattr(unit, "get_sequence_parallel_world_size"),
    }


def test_tensor_parallelism_is_its_model_parallelism() -> None:
    ranks = run_ranks(told, 4, 2, 1)
    assert [one["model"] for one in ranks] == [one["tensor"] for one in ranks] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [one["source"] for one in ranks] == [0, 0, 2, 2]
    assert [one["data"] for one in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert ranks[1]["replicas"] == [1, 3]
    assert not any(one["ulysses"] for one in ranks)


def test_ranks_of_one_context_average_gradients_as_replicas_do() -> None:
    assert [one["data"] for one in run_ranks(told, 2, 1, 2)] == [(0, 2), (1, 2)]
