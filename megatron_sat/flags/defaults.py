"""From what was given to what holds: defaults that depend on the machine, the layout and other settings.

Megatron-LM decides these in `validate_args`; the rules are the same, but for kernels that this machine has
not and for what only sparse layers have. Needs settings that `checks.prerequisites` has passed.
"""

import importlib.util
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_sat.flags.baselines import ON_SPARSE_LAYERS, resolve_baseline
from megatron_sat.flags.deepspeed import resolve_engine
from megatron_sat.flags.flag import Settings
from megatron_sat.flags.table import table
from megatron_sat.layers.available import (
    apex_rms_norm,
    flash_attention,
    transformer_engine_norm,
)
from megatron_sat.sparsity.schedule import parse_rate

CHANNEL_MULTIPLE = 128
"""Kept channels on CUDA: odd widths leave the tensor cores' path."""

OTHER_ACTIVATIONS = ("swiglu", "squared_relu", "quick_geglu")
"""Settings with which an MLP has another activation than GELU."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a default may depend on: the GPU, and the optional libraries that can be used."""

    cuda: bool
    flash_attn: bool = False
    transformer_engine: bool = False
    apex: bool = False
    """apex' norm."""
    emerging_optimizers: bool = False
    """The library behind Muon, Lion and SOAP, and a megatron.core that knows it."""


def look_at_machine(*, cuda: bool) -> Machine:
    """The machine of this process; without ``cuda`` no library counts."""
    return Machine(
        cuda=cuda,
        flash_attn=flash_attention(cuda=cuda) is not None,
        transformer_engine=transformer_engine_norm(cuda=cuda) is not None,
        apex=apex_rms_norm(cuda=cuda) is not None,
        emerging_optimizers=_has_emerging_optimizers(),
    )


def _has_emerging_optimizers() -> bool:
    known = "soap_shampoo_beta" in OptimizerConfig.__dataclass_fields__  # from 0.17 on
    return known and importlib.util.find_spec("emerging_optimizers") is not None


def data_parallel_size(settings: Settings, *, world_size: int) -> int:
    """Replicas: ranks over tensor x pipeline x context parallelism; whole only where `checks` pass."""
    taken = settings["tensor_model_parallel_size"] * settings["pipeline_model_parallel_size"]
    return world_size // (taken * settings["context_parallel_size"])


def resolve(given: Settings, *, machine: Machine, world_size: int) -> dict[str, Any]:
    """Every working setting with the value that holds; None where nothing was given and none is needed."""
    settings = {flag.key: flag.default for flag in table().working}
    settings |= {key: value for key, value in given.items() if key in settings and value is not None}
    resolve_engine(settings)
    resolve_baseline(settings, given=given)
    _layout(settings, machine=machine)
    _model(settings, machine=machine)
    _precision(settings)
    _batch(settings, world_size=world_size)
    _method(settings, machine=machine)
    _choosing(settings, said={key for key, value in given.items() if value is not None})
    if settings["sft"] and given.get("calculate_per_token_loss") is None:
        settings["calculate_per_token_loss"] = True  # responses are of many lengths: each of their tokens counts alike
    return settings


def _fill(settings: dict[str, Any], key: str, value: Any) -> None:
    if settings[key] is None:
        settings[key] = value


def _layout(s: dict[str, Any], *, machine: Machine) -> None:
    _fill(s, "distributed_backend", "nccl" if machine.cuda else "gloo")
    if s["tensor_model_parallel_size"] == 1:
        s["sequence_parallel"] = False
    s["num_virtual_stages_per_pipeline_rank"] = virtual_stages(s)
    s["num_layers_per_virtual_pipeline_stage"] = None
    interleaved = s["num_virtual_stages_per_pipeline_rank"] is not None
    s["overlap_p2p_comm"] = interleaved and s["overlap_p2p_comm"] is not False
    s["align_param_gather"] = interleaved and s["align_param_gather"] is not False
    # gloo goes on reading an output that an interleaved pipeline frees once it is posted: garbage arrives
    _fill(s, "deallocate_pipeline_outputs", machine.cuda)


def virtual_stages(settings: Settings) -> int | None:
    """Model chunks a pipeline rank, from whichever of three settings says it; None without interleaving."""
    pp, layers = settings["pipeline_model_parallel_size"], settings["num_layers"]
    stages = settings["num_virtual_stages_per_pipeline_rank"]
    if settings["num_layers_per_virtual_pipeline_stage"] is not None:
        layers += (
            settings["account_for_embedding_in_pipeline_split"]
            + settings["account_for_loss_in_pipeline_split"]
        )
        stages = layers // pp // settings["num_layers_per_virtual_pipeline_stage"]
    elif settings["pipeline_model_parallel_layout"] is not None:
        stages = _stages_of(settings["pipeline_model_parallel_layout"]) // pp
    return None if stages == 1 else stages


def _stages_of(layout: str) -> int:
    try:
        return PipelineParallelLayerLayout.get_num_stages_from_str(layout)
    except AssertionError as error:
        raise ValueError(
            f"--pipeline-model-parallel-layout must be a layout of megatron.core, got {layout!r}: {error}; "
            "write Ett|ttL for two stages of two layers"
        ) from error


def _model(s: dict[str, Any], *, machine: Machine) -> None:
    gated = 8 * s["hidden_size"] // 3 // 64 * 64  # Megatron-LM: as many parameters as 4 h without the gate
    _fill(s, "ffn_hidden_size", gated if s["swiglu"] else 4 * s["hidden_size"])
    _fill(s, "kv_channels", s["hidden_size"] // s["num_attention_heads"])
    s["add_qkv_bias"] = s["add_qkv_bias"] or s["add_bias_linear"]
    _fill(s, "use_cpu_initialization", not machine.cuda)
    if s["attention_backend"] != "flash":
        s["attention_backend"] = "auto"
    s["cpu_offloading"] = s["cpu_offloading"] or s["cpu_offloading_num_layers"] > 0
    _fill(s, "bias_swiglu_fusion", machine.cuda)
    _gelu(s, machine=machine)
    _fill(s, "bias_dropout_fusion", machine.cuda)
    _fill(s, "gradient_accumulation_fusion", True)  # by apex, or by torch where apex is not installed
    _fill(s, "apply_rope_fusion", machine.transformer_engine and s["position_embedding_type"] == "rope")


def _gelu(s: dict[str, Any], *, machine: Machine) -> None:
    """Which form GELU has. Megatron-LM's fused kernel, its default where there are biases, computes the tanh form: so
    it is that on a machine without the kernel too, and what a flag says does not depend on where it is read."""
    others = any(s[key] for key in OTHER_ACTIVATIONS)
    _fill(s, "openai_gelu", not others and s["add_bias_linear"] and s["bias_gelu_fusion"] is not False)
    _fill(s, "bias_gelu_fusion", machine.cuda and (others or s["openai_gelu"]))


def _precision(s: dict[str, Any]) -> None:
    needs_fp32 = s["bf16"] and not s["grad_reduce_in_bf16"] and s["main_grads_dtype"] == "fp32"
    _fill(s, "accumulate_allreduce_grads_in_fp32", needs_fp32)
    # with dynamic loss scaling NaN in gradients is how the scaler learns that its scale is too high; and --on-bad-step
    # sees it in the norm, which clipping computes anyway, where megatron.core's check would break off on one rank alone
    scaled = s["fp16"] and not s["loss_scale"]
    _fill(s, "check_for_nan_in_loss_and_grad", not scaled and s["clip_grad"] == 0)


def _batch(s: dict[str, Any], *, world_size: int) -> None:
    replicas = max(1, data_parallel_size(s, world_size=world_size))
    _fill(s, "global_batch_size", s["micro_batch_size"] * replicas)
    if s["save"] is not None:
        _fill(s, "log_jsonl", str(Path(s["save"]) / "metrics.jsonl"))


def _method(s: dict[str, Any], *, machine: Machine) -> None:
    if s["sat_omission_rate"] is not None:
        s["sat_omission_rate"] = written_rate(s["sat_omission_rate"])
    _fill(s, "sat_selection_groups", s["tensor_model_parallel_size"])
    channels = s["ffn_hidden_size"] // max(1, s["sat_selection_groups"])
    wide = machine.cuda and channels >= CHANNEL_MULTIPLE
    _fill(s, "sat_channel_multiple", CHANNEL_MULTIPLE if wide else 1)
    _fill(s, "sat_weights", "compact" if s["gradient_accumulation_fusion"] else "gather")
    _fill(s, "sat_seed", s["seed"])
    _fill(s, "layer_graphs", False)


def _choosing(s: dict[str, Any], *, said: Set[str]) -> None:
    """The table's way of choosing gives way to what else was said where both cannot be."""
    if s["baseline"] in ON_SPARSE_LAYERS:
        return  # it has said all of it
    if "sat_selection" not in said and s["sat_importance"] == "uniform":
        s["sat_selection"] = "sampling"  # top-k of equal scores would keep the first neurons forever
    if "sat_selection_interval" not in said:
        alone = s["sat_dp_selection"] == "local"  # a checkpoint carries one replica's choice
        samples = s["train_samples"]
        steps = s["train_iters"] if samples is None else samples // s["global_batch_size"]
        s["sat_selection_interval"] = 1 if alone else max(1, min(s["sat_selection_interval"], steps))


def written_rate(rate: str) -> str:
    """An omission rate in one spelling, exact: a decimal where it has one, else a fraction."""
    exact = parse_rate(rate)
    decimal = repr(float(exact))
    return decimal if parse_rate(decimal) == exact else str(exact)
