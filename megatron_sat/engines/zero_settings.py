"""DeepSpeed's own configuration: what the flags say, and what a file may add to it.

The flags rule: batch sizes, clipping, precision and the stage of ZeRO are said once, with Megatron-LM's names. A file
(``--deepspeed-config``) may repeat them, write "auto", or leave them out; where it says something else, both are
named and the run is refused. It may tune how ZeRO works (`TUNABLE`). Everything else in it would replace a part of
this program or was never tried with it, and is refused by name. Pure: a mapping in, a mapping out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUTO = "auto"
"""In a file: whatever the flags say."""

TUNABLE = frozenset(
    """stage contiguous_gradients reduce_scatter reduce_bucket_size allgather_partitions allgather_bucket_size
    overlap_comm round_robin_gradients offload_optimizer offload_param sub_group_size prefetch_bucket_size
    param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance
    stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold
    stage3_max_live_parameters stage3_max_reuse_distance
    """.split()
)
"""Keys of ``zero_optimization``."""

_OFFLOAD = frozenset(("device", "pin_memory"))
_HARMLESS = frozenset(("steps_per_print", "wall_clock_breakdown", "comms_logger", "zero_allow_untested_optimizer"))
_INSTEAD = {
    "optimizer": "use --optimizer, --lr, --adam-beta1, --adam-beta2, --adam-eps and --weight-decay",
    "scheduler": "use --lr-decay-style, --lr-warmup-iters and --min-lr",
    "tensor_parallel": "use --tensor-model-parallel-size",
    "sequence_parallel_size": "use --context-parallel-size",
    "activation_checkpointing": "use --recompute-granularity",
    "pipeline": "use --engine megatron --pipeline-model-parallel-size",
    "tensorboard": "use --tensorboard-dir",
    "amp": "use --bf16",
    "torch_autocast": "use --bf16",
    "checkpoint": "use --save and --load",
    "communication_data_type": "use --accumulate-allreduce-grads-in-fp32",
}


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the flags say of that which DeepSpeed's configuration says too."""

    zero_stage: int
    micro_batch_size: int
    global_batch_size: int
    num_micro_batches: int
    clip_grad: float
    bf16: bool
    fp32_gradients: bool
    """Gradients are added up and reduced in fp32."""


def read_file(path: str) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ValueError for what cannot be read or is none."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise ValueError(f"{twice[0]} is given twice")
        return dict(pairs)

    try:
        content = json.loads(Path(path).read_text(), object_pairs_hook=once)
    except OSError as error:
        raise ValueError(f"--deepspeed-config must be a readable file, {path} is not: {error.strerror}") from None
    except ValueError as error:  # broken JSON, a key given twice, or no text
        raise ValueError(f"--deepspeed-config must be JSON, {path} is not: {error}; mend it") from None
    if not isinstance(content, dict):
        raise ValueError(f"--deepspeed-config must hold keys and values, {path} does not; mend it")
    return content


def stage_in(content: Mapping[str, Any]) -> int | None:
    """The stage of ZeRO that a file asks for; None where it leaves it open."""
    stage = _at(content, "zero_optimization.stage")
    return None if stage in (None, AUTO) else stage


def merge(content: Mapping[str, Any], *, said: Said) -> dict[str, Any]:
    """What ``deepspeed.initialize`` takes as its config: ``content`` of a file (empty without one) under the flags.

    Raises ValueError for a contradiction, naming both sides, and for what is not supported.
    """
    _refuse_unsupported(content)
    merged: dict[str, Any] = {"steps_per_print": 1_000_000_000, "zero_allow_untested_optimizer": True}
    merged |= {key: value for key, value in content.items() if key in _HARMLESS and value != AUTO}
    zero = {key: value for key, value in content.get("zero_optimization", {}).items() if value != AUTO}
    precision = "fp32" if said.fp32_gradients or not said.bf16 else "bf16"
    rules: tuple[tuple[str, str, Any], ...] = (
        ("zero_optimization.stage", f"--zero-stage {said.zero_stage}", said.zero_stage),
        ("train_batch_size", f"--global-batch-size {said.global_batch_size}", said.global_batch_size),
        ("train_micro_batch_size_per_gpu", f"--micro-batch-size {said.micro_batch_size}", said.micro_batch_size),
        (
            "gradient_accumulation_steps",
            f"--global-batch-size {said.global_batch_size} on these replicas ({said.num_micro_batches} micro-batches)",
            said.num_micro_batches,
        ),
        ("gradient_clipping", f"--clip-grad {said.clip_grad}", said.clip_grad),
        ("bf16.enabled", "--bf16" if said.bf16 else "no --bf16", said.bf16),
        ("fp16.enabled", "no --fp16", False),
        (
            "data_types.grad_accum_dtype",
            f"{'--' if precision == 'fp32' else '--no-'}accumulate-allreduce-grads-in-fp32",
            precision,
        ),
    )
    for path, flag, value in rules:
        theirs = _at(content, path)
        if theirs not in (None, AUTO) and theirs != value:
            raise ValueError(
                f"{path} of --deepspeed-config ({theirs}) and {flag} must say the same; change one of them, or "
                f'write "{AUTO}" in the file'
            )
    return merged | {
        "train_micro_batch_size_per_gpu": said.micro_batch_size,
        "gradient_accumulation_steps": said.num_micro_batches,
        "gradient_clipping": said.clip_grad,
        "bf16": {"enabled": said.bf16, "check_grad_overflow": said.bf16},  # or ZeRO 2 would update by NaN
        "data_types": {"grad_accum_dtype": precision},
        "communication_data_type": precision,
        "zero_optimization": zero | {"stage": said.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
    }


def _at(content: Mapping[str, Any], path: str) -> Any:
    """The value under a dotted path; None where there is none."""
    found: Any = content
    for name in path.split("."):
        if not isinstance(found, Mapping):
            raise ValueError(f"{path} of --deepspeed-config must lie in a mapping, {found!r} stands before {name}")
        found = found.get(name)
        if found is None:
            return None
    return found


_FROM_FLAGS = {
    "train_batch_size": (),
    "train_micro_batch_size_per_gpu": (),
    "gradient_accumulation_steps": (),
    "gradient_clipping": (),
    "bf16": ("enabled",),
    "fp16": ("enabled",),
    "data_types": ("grad_accum_dtype",),
    "zero_optimization": tuple(TUNABLE),
}
"""What a file may say, and inside of it."""


def _refuse_unsupported(content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if key not in _FROM_FLAGS and key not in _HARMLESS:
            raise ValueError(
                f"{key} in --deepspeed-config is not supported; {_INSTEAD.get(key, 'no run here was tried with it')}, "
                "and take it out of the file"
            )
        inside = _FROM_FLAGS.get(key, ())
        if inside and not isinstance(value, Mapping):
            raise ValueError(f"{key} in --deepspeed-config must hold keys and values, got {value!r}; mend it")
        unknown = [name for name in value if name not in inside] if inside else []
        if unknown and not (key == "fp16" and not value.get("enabled")):
            raise ValueError(f"{key}.{unknown[0]} in --deepspeed-config is not supported; take it out of the file")
    for name in ("offload_optimizer", "offload_param"):
        _refuse_offload(content.get("zero_optimization", {}).get(name), name=name)


def _refuse_offload(where: Any, *, name: str) -> None:
    if where is None:
        return
    path = f"zero_optimization.{name}"
    if not isinstance(where, Mapping) or set(where) - _OFFLOAD:
        raise ValueError(
            f"{path} in --deepspeed-config may hold {' and '.join(sorted(_OFFLOAD))}, got {where!r}; mend it"
        )
    if where.get("device", "none") not in ("none", "cpu"):
        raise ValueError(f"{path}.device in --deepspeed-config must be cpu or none, got {where['device']}; use cpu")


def offloads(merged: Mapping[str, Any]) -> list[str]:
    """Which of optimizer and parameters the configuration keeps in the host's memory."""
    zero = merged["zero_optimization"]
    names = ("offload_optimizer", "offload_param")
    return [name for name in names if (zero.get(name) or {}).get("device", "none") != "none"]
