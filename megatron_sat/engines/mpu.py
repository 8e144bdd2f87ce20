"""What DeepSpeed asks of an ``mpu``: megatron.core's groups, under the names that DeepSpeed 0.19 calls.

megatron.core's parallel_state lost three of these getters. To DeepSpeed, "model parallel" is tensor parallelism, and
"data parallel" are all ranks that hold the same part of the model: with context parallelism those average gradients
too. Attributes that it must not find decide as well: ``initialize_sequence_parallel`` would be taken for Ulysses.
"""

import torch.distributed as dist

from megatron_sat.distributed import Layout


class ModelParallelUnit:
    """Pass one as ``deepspeed.initialize(mpu=...)``; pipelines have one stage."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    # -- tensor parallelism: which norms and overflows are summed up, and over whom

    def get_model_parallel_rank(self) -> int:
        return self._layout.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._layout.tp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._layout.tp_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self._layout.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._layout.tp_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._layout.tp_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self._layout.tp_group)[0]

    # -- pipelines: none

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    # -- replicas: over whom gradients are averaged and states are cut

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._layout.dp_cp_group)

    def get_data_parallel_world_size(self) -> int:
        return self._layout.dp_size * self._layout.cp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._layout.dp_cp_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._layout.dp_cp_group)
