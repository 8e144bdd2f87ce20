"""The settings under ``--engine deepspeed``: which of them it takes over, which cannot be, and what its own come to.

Every refusal names the setting, what is needed, what was given and the way out, before anything is built.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_sat.engines.zero_settings import Said, merge, offloads, read_file, stage_in
from megatron_sat.flags.flag import Settings, dashed

_NEEDS: tuple[tuple[str, Any, str], ...] = (
    ("optimizer", "adam", "DeepSpeed steps on torch's AdamW here; use --optimizer adam"),
    ("fp16", False, "its loss scaling was never compared; use --bf16"),
    ("grad_norm_skip_threshold", math.inf, "DeepSpeed has no such limit; use --max-norm-leap"),
    ("main_grads_dtype", "fp32", "use --no-accumulate-allreduce-grads-in-fp32"),
    ("main_params_dtype", "fp32", "DeepSpeed's copies are fp32; leave it out"),
    ("exp_avg_dtype", "fp32", "DeepSpeed's moments are fp32; leave it out"),
    ("exp_avg_sq_dtype", "fp32", "DeepSpeed's moments are fp32; leave it out"),
    ("train_only", "all", "its shards hold no part of a model; make it a stage of its own with --engine megatron"),
)
"""(key, the value it must have, why and the way out)."""

_MEGATRONS: Mapping[str, str] = {
    "use_distributed_optimizer": "use --zero-stage 1",
    "overlap_grad_reduce": "set zero_optimization.overlap_comm in --deepspeed-config",
    "overlap_param_gather": "set zero_optimization.overlap_comm in --deepspeed-config",
    "overlap_param_gather_with_optimizer_step": "leave it out",
    "align_param_gather": "leave it out",
    "ddp_bucket_size": "set zero_optimization.reduce_bucket_size in --deepspeed-config",
    "ddp_num_buckets": "set zero_optimization.reduce_bucket_size in --deepspeed-config",
    "ddp_pad_buckets_for_high_nccl_busbw": "leave it out",
    "ddp_reduce_scatter_with_fp32_accumulation": "leave it out",
    "ddp_param_name_patterns_for_fp32_local_accumulation": "leave it out",
    "ddp_average_in_collective": "leave it out",
    "check_for_large_grads": "leave it out",
    "nccl_ub": "leave it out",
    "use_precision_aware_optimizer": "leave it out",
    "optimizer_cpu_offload": "set zero_optimization.offload_optimizer in --deepspeed-config",
    "gradient_accumulation_fusion": "DeepSpeed's gradients have no main_grad to add to; leave it out",
    "defer_embedding_wgrad_compute": "DeepSpeed's gradients have no main_grad to add to; leave it out",
    "sat_sparse_reduce": "ZeRO reduces whole gradients; leave it out",
    "layer_graphs": "recorded layers add to a main_grad, which DeepSpeed has not; leave it out",
}
"""Settings that megatron.core's DDP and optimizers alone obey: key to the way out."""

_LEAST_STAGE: Mapping[str, int] = {"offload_optimizer": 1, "offload_param": 3}
"""Of ZeRO, below which DeepSpeed passes over a file's wish."""


def resolve_engine(settings: dict[str, Any]) -> None:
    """Fill in what the engine decides. Raises ValueError for a file of DeepSpeed's that cannot be read."""
    if settings["engine"] != "deepspeed":
        return
    settings["gradient_accumulation_fusion"] = bool(settings["gradient_accumulation_fusion"])
    if settings["zero_stage"] is None:
        stage = stage_in(_content(settings))
        settings["zero_stage"] = 1 if stage is None else stage


def check_engine(settings: Settings) -> None:
    """Raise ValueError for the first setting that ``--engine deepspeed`` cannot obey."""
    if settings["engine"] != "deepspeed":
        return
    stages = settings["pipeline_model_parallel_size"]
    if stages > 1:
        raise ValueError(
            f"--engine deepspeed needs --pipeline-model-parallel-size 1, got {stages}: ZeRO and this pipeline would "
            "each add up gradients their own way; use --tensor-model-parallel-size, or --engine megatron"
        )
    if settings["sat_schedule"] != "none" and settings["sat_weights"] == "compact":
        raise ValueError(
            "--engine deepspeed needs --sat-weights gather, got compact: packed gradients add up in a main_grad, which "
            "DeepSpeed has not; leave --sat-weights out"
        )
    for key, value, why in _NEEDS:
        if settings.get(key, value) != value:  # some are not in megatron-core 0.16
            need = f"{dashed(key)} {value}" if value is not False else f"no {dashed(key)}"
            raise ValueError(f"--engine deepspeed needs {need}, got {settings[key]}: {why}")
    for key, way_out in _MEGATRONS.items():
        if settings.get(key):
            raise ValueError(f"{dashed(key)} is for --engine megatron, got it with --engine deepspeed; {way_out}")
    _check_stage(settings)


def _check_stage(settings: Settings) -> None:
    stage = settings["zero_stage"]
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"--zero-stage must be 0, 1, 2 or 3, got {stage}; change zero_optimization.stage")
    if stage == 0 and settings["bf16"]:
        raise ValueError(
            "--bf16 with --engine deepspeed needs --zero-stage 1 or above, got 0: without ZeRO DeepSpeed adds up "
            "gradients in bf16; use --zero-stage 1"
        )


def deepspeed_settings(settings: Settings, *, num_micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's configuration; empty for another engine. Raises ValueError for a contradiction with its file."""
    if settings["engine"] != "deepspeed":
        return {}
    merged = merge(
        _content(settings),
        said=Said(
            zero_stage=settings["zero_stage"],
            micro_batch_size=settings["micro_batch_size"],
            global_batch_size=settings["global_batch_size"],
            num_micro_batches=num_micro_batches,
            clip_grad=settings["clip_grad"],
            bf16=settings["bf16"],
            fp32_gradients=settings["accumulate_allreduce_grads_in_fp32"] or not settings["bf16"],
        ),
    )
    for name in offloads(merged):
        least = _LEAST_STAGE[name]
        if settings["zero_stage"] < least:
            raise ValueError(
                f"zero_optimization.{name} of --deepspeed-config needs --zero-stage {least}, got "
                f"{settings['zero_stage']}; take it out of the file or use --zero-stage {least}"
            )
    return merged


def _content(settings: Settings) -> dict[str, Any]:
    return read_file(settings["deepspeed_config"]) if settings["deepspeed_config"] else {}
