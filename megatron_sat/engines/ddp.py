"""Model chunks in megatron.core's DDP: gradients in buckets, reduced over data and context parallelism.

Megatron-LM's trainer decides two things before it wraps a model that megatron.core's DDP does not decide for itself:
how large a bucket is where their number is given, and (0.19) where in its buffers each parameter lies.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig


def wrap_chunks(
    chunks: Sequence[torch.nn.Module],
    *,
    config: TransformerConfig,
    ddp_config: DistributedDataParallelConfig,
    one_bucket: bool,
) -> list[DistributedDataParallel]:
    """DDP around each chunk. Fills `ddp_config.bucket_size` in where it follows from the number of buckets.

    one_bucket: leave every chunk's gradients in one bucket. The chunks of an interleaved pipeline after the first
    always are: their reductions hide behind the pipeline.
    """
    if getattr(ddp_config, "num_buckets", None):  # 0.16.1 does not know it
        parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)
        ddp_config.bucket_size = max(1, parameters // ddp_config.num_buckets)
    wrapped = []
    for index, chunk in enumerate(chunks):
        whole = one_bucket or index > 0
        extra = _layout_of(chunk, ddp_config=ddp_config, one_bucket=whole)
        wrapped.append(DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=whole, **extra))
    return wrapped


def _layout_of(
    chunk: torch.nn.Module, *, ddp_config: DistributedDataParallelConfig, one_bucket: bool
) -> dict[str, Any]:
    """The argument that 0.19 wants to be handed with a distributed optimizer; it warns where it must work it out."""
    if not ddp_config.use_distributed_optimizer or not hasattr(DistributedOptimizer, "compute_full_param_layout"):
        return {}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)
    # as DDP itself resolves it: later pipeline stages are off the critical path, and without overlap nothing is cut
    cut = ddp_config.overlap_grad_reduce and not one_bucket and parallel_state.get_pipeline_model_parallel_rank() == 0
    default = max(40_000_000, 1_000_000 * group.size())
    size = (ddp_config.bucket_size or default) if cut else None
    parameters = [p for p in chunk.parameters() if p.requires_grad]
    layout = DistributedOptimizer.compute_full_param_layout(parameters, size, group.size(), ddp_config)
    return {"full_param_layout": layout}
