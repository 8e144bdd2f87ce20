"""Settings out of megatron.core's own configuration classes: what the installed version offers can be set.

A field becomes a setting of its name; `SPELLED` adds the names that Megatron-LM gives it instead, `DEFAULTS`
the defaults of its parser where they are not the class's. `GIVEN_ELSEWHERE` are the fields that follow from
other settings; what no text can express (functions, recipes) is `inexpressible`.
"""

import enum
import types
import typing
from dataclasses import MISSING, Field, fields
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sat.flags.flag import Flag, Kind, Settings, option, switch

SECTIONS: dict[type, str] = {
    TransformerConfig: "transformer",
    DistributedDataParallelConfig: "gradients",
    OptimizerConfig: "optimization",
}
"""The classes, in order of precedence for a field that several of them have, and where it is printed."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}

GIVEN_ELSEWHERE: dict[str, str] = {
    "params_dtype": "--bf16 or --fp16",
    "pipeline_dtype": "--bf16 or --fp16",
    "activation_func": "--swiglu, --squared-relu, --quick-geglu or --openai-gelu",
    "gated_linear_unit": "--swiglu or --quick-geglu",
    "bias_activation_fusion": "--no-bias-swiglu-fusion or --no-bias-gelu-fusion",
    "virtual_pipeline_model_parallel_size": "--num-virtual-stages-per-pipeline-rank",
    "batch_p2p_comm": "--no-overlap-p2p-communication",
    "init_method": "--init-method-std or --init-method-xavier-uniform",
    "output_layer_init_method": "--init-method-std or --init-method-xavier-uniform",
    "embedding_init_method": "--embedding-init-method-std",
    "grad_reduce_in_fp32": "--accumulate-allreduce-grads-in-fp32 or --grad-reduce-in-bf16",
    "lr": "--lr",
    "min_lr": "--min-lr",
    "weight_decay": "--weight-decay",
}
"""Fields that follow from settings of other names: field to those names."""

KEYS: dict[str, str] = {
    "check_for_nan_in_grad": "check_for_nan_in_loss_and_grad",
    "bucket_size": "ddp_bucket_size",
    "num_buckets": "ddp_num_buckets",
    "pad_buckets_for_high_nccl_busbw": "ddp_pad_buckets_for_high_nccl_busbw",
    "reduce_scatter_with_fp32_accumulation": "ddp_reduce_scatter_with_fp32_accumulation",
    "param_name_patterns_for_fp32_local_accumulation": "ddp_param_name_patterns_for_fp32_local_accumulation",
    "average_in_collective": "ddp_average_in_collective",
}
"""Fields whose setting has Megatron-LM's longer name."""

SPELLED: dict[str, tuple[str, ...]] = {
    "num_layers": ("--encoder-num-layers",),
    "layernorm_epsilon": ("--norm-epsilon",),
    "num_layers_in_first_pipeline_stage": ("--decoder-first-pipeline-num-layers",),
    "num_layers_in_last_pipeline_stage": ("--decoder-last-pipeline-num-layers",),
    "microbatch_group_size_per_vp_stage": ("--microbatch-group-size-per-virtual-pipeline-stage",),
    "overlap_p2p_comm_warmup_flush": ("--overlap-p2p-communication-warmup-flush",),
    "nccl_ub": ("--use-nccl-ub",),
}
"""Further names of a field's setting: those with which it takes a value or is switched on."""

SPELLED_NO: dict[str, tuple[str, ...]] = {
    "perform_initialization": ("--no-initialization",),
    "add_bias_linear": ("--disable-bias-linear",),
    "overlap_p2p_comm": ("--no-overlap-p2p-communication",),
    "apply_rope_fusion": ("--no-rope-fusion",),
    "clone_scatter_output_in_embedding": ("--disable-clone-scatter-output-in-embedding",),
    "muon_split_qkv": ("--muon-no-split-qkv",),
    "barrier_with_L1_time": ("--no-barrier-with-level-1-timing",),
}
"""Further names with which a boolean field is switched off."""

DEFAULTS: dict[str, Any] = {
    "num_layers": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "num_query_groups": 1,
    "use_cpu_initialization": None,
    "gradient_accumulation_fusion": None,
    "bias_dropout_fusion": None,
    "apply_rope_fusion": None,
    "deallocate_pipeline_outputs": None,
    "overlap_p2p_comm": None,
    "align_param_gather": None,
    "check_for_nan_in_grad": None,
    "optimizer_offload_fraction": 1.0,
    "muon_momentum": 0.9,
}
"""Defaults of Megatron-LM's parser that are not the class's; None where the machine or the layout decides."""

CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("adam", "sgd", "muon", "dist_muon", "lion", "soap", "adaptive_muon"),
    "muon_scale_mode": ("spectral", "unit_rms_norm", "shape_scaling"),
    "muon_fp32_matmul_prec": ("low", "medium", "high"),
    "muon_tp_mode": ("blockwise", "duplicated", "distributed"),
    "muon_scalar_optimizer": ("adam", "lion"),
    "main_grads_dtype": ("fp32", "bf16"),
    "main_params_dtype": ("fp32", "fp16"),
    "exp_avg_dtype": ("fp32", "fp16", "bf16", "fp8"),
    "exp_avg_sq_dtype": ("fp32", "fp16", "bf16", "fp8"),
}
"""What Megatron-LM's parser allows where the class says no more than str or dtype."""


def setting_of(field: Field) -> Flag | None:  # type: ignore[type-arg]
    """The setting of one field; None for one that no text can express or that follows from other settings."""
    form = None if field.name in GIVEN_ELSEWHERE else _form(field.type)
    if form is None:
        return None
    kind, many, choices = form
    key = KEYS.get(field.name, field.name)
    default = _plain(DEFAULTS.get(field.name, field.default if field.default is not MISSING else None))
    yes, no = SPELLED.get(field.name, ()), SPELLED_NO.get(field.name, ())
    if kind == "bool":
        if default and not no:
            no = (f"--disable-{key.replace('_', '-')}",)
        return switch(key, yes=yes, no=no, default=default)
    return option(key, kind, *yes, many=many, choices=CHOICES.get(field.name, choices), default=default)


def inexpressible() -> dict[str, str]:
    """Fields of the three classes that no setting can stand for: "Class.field" to its type."""
    return {
        f"{cls.__name__}.{field.name}": str(field.type)
        for cls in SECTIONS
        for field in fields(cls)
        if field.name not in GIVEN_ELSEWHERE and _form(field.type) is None
    }


def keywords(cls: type, settings: Settings) -> dict[str, Any]:
    """Keyword arguments of ``cls`` out of ``settings``, in its fields' types; None is left to the class."""
    found = {}
    for field in fields(cls):
        value = settings.get(KEYS.get(field.name, field.name))
        if value is not None and field.name not in GIVEN_ELSEWHERE:
            found[field.name] = _typed(field.type, value)
    return found


def _form(declared: Any) -> tuple[Kind, Literal["", "+"], tuple[Any, ...]] | None:
    """(kind, many, choices) of a declared type, or None."""
    plain: dict[Any, Kind] = {bool: "bool", int: "int", float: "float", str: "str"}
    if declared in plain:
        return plain[declared], "", ()
    if declared is torch.dtype:
        return "str", "", tuple(DTYPES)
    if isinstance(declared, enum.EnumMeta):
        return "str", "", tuple(declared.__members__)
    origin, inside = typing.get_origin(declared), typing.get_args(declared)
    if origin is Literal:
        return plain[type(inside[0])], "", inside
    if origin in (list, tuple) and inside[0] in plain and inside[1:] in ((), (...,)):
        return plain[inside[0]], "+", ()
    if origin in (typing.Union, types.UnionType):
        return _form_of_union([part for part in inside if part is not type(None)])
    return None


def _form_of_union(parts: list[Any]) -> tuple[Kind, Literal["", "+"], tuple[Any, ...]] | None:
    if len(parts) == 1:
        return _form(parts[0])
    if parts == [int, list[int]] or parts == [int, typing.List[int]]:  # noqa: UP006  (megatron declares it so)
        return "pattern", "", ()
    return ("str", "", ()) if str in parts else None


def _typed(declared: Any, value: Any) -> Any:
    inside = [part for part in typing.get_args(declared) if part is not type(None)]
    if typing.get_origin(declared) in (typing.Union, types.UnionType) and len(inside) == 1:
        declared = inside[0]
    if declared is torch.dtype:
        return DTYPES[value]
    if isinstance(declared, enum.EnumMeta):
        return declared[value]
    return tuple(value) if typing.get_origin(declared) is tuple else value


def _plain(default: Any) -> Any:
    if isinstance(default, torch.dtype):
        return next(name for name, dtype in DTYPES.items() if dtype == default)
    if isinstance(default, enum.Enum):
        return default.name
    return list(default) or None if isinstance(default, tuple) else default
