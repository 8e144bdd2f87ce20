"""Settings that do nothing beside others. The method's are refused when given; Megatron-LM's, which its own
trainer passes over in silence, are remarked upon. A printed configuration leaves them all out.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_sat.flags import sat
from megatron_sat.flags.baselines import MST
from megatron_sat.flags.defaults import OTHER_ACTIVATIONS
from megatron_sat.flags.flag import Flag, Settings, dashed
from megatron_sat.flags.table import table


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Some settings, and when they do nothing."""

    keys: str
    """Patterns of keys."""
    idle: Callable[[Settings], bool]
    beside: str
    """What makes them idle, after "have no effect"."""

    def found(self, settings: Settings) -> list[str]:
        """The keys that do nothing under ``settings``."""
        if not self.idle(settings):
            return []
        return [key for key in settings if any(fnmatchcase(key, pattern) for pattern in self.keys.split())]


def grouped_queries(settings: Settings) -> bool:
    """Whether query groups and heads are two things."""
    return (
        settings["group_query_attention"] and settings["num_query_groups"] != settings["num_attention_heads"]
    )


def against_layer_graphs(settings: Settings) -> list[str]:
    """Settings under which a layer cannot be replayed: other ranks, random numbers, or work between the kernels."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    others = ("recompute_granularity", "overlap_param_gather", "add_bias_linear", "add_qkv_bias", "cpu_offloading")
    found = [key for key in sizes if settings[key] > 1]
    found += [key for key in ("hidden_dropout", "attention_dropout") if settings[key] > 0]
    found += [key for key in (*others, "sft") if settings[key]]
    found += ["baseline"] if settings["baseline"] in ("mst", "est") else []  # attention, or layers, change
    return found if settings["gradient_accumulation_fusion"] else [*found, "gradient_accumulation_fusion"]


_SCORED_BY_TOKENS = ("wanda", "maxip", "contribution")
_SCORED_BY_ROWS = ("magnitude", "wanda", "maxip")

METHOD: tuple[Rule, ...] = (
    Rule(
        keys=" ".join(
            flag.key for flag in sat.METHOD if flag.key not in ("sat_schedule", "sat_omission_rate")
        ),
        idle=lambda s: s["sat_schedule"] == "none",
        beside="with --sat-schedule none, which is dense",
    ),
    Rule(
        keys="sat_sparse_reduce",
        idle=lambda s: s["sat_schedule"] == "none",
        beside="with --sat-schedule none, which leaves no neuron out",
    ),
    Rule(
        keys="sat_temperature sat_seed",
        idle=lambda s: s["sat_selection"] == "top-k",
        beside="with --sat-selection top-k, the default, which draws nothing",
    ),
    Rule(
        keys="sat_temperature",
        idle=lambda s: s["sat_selection"] == "mixed-growing",
        beside="with --baseline mst-structured, which draws evenly",
    ),
    Rule(
        keys="sat_temperature",
        idle=lambda s: s["baseline"] == "est",
        beside="with --baseline est, which draws evenly",
    ),
    Rule(
        keys="sat_swiglu_score",
        idle=lambda s: not s["swiglu"] and not s["quick_geglu"],
        beside="without --swiglu",
    ),
    Rule(
        keys="sat_swiglu_score sat_channel_multiple",
        idle=lambda s: s["sat_modules"] == "attention",
        beside="with --sat-modules attention, which omits no channel",
    ),
    Rule(
        keys="sat_gqa",
        idle=lambda s: s["sat_modules"] == "mlp",
        beside="with --sat-modules mlp, which omits no head",
    ),
    Rule(
        keys="sat_swiglu_score",
        idle=lambda s: s["sat_importance"] not in _SCORED_BY_ROWS,
        beside="with --sat-importance uniform or contribution, the default, which score no row of the gate",
    ),
    Rule(
        keys="sat_statistics sat_dp_selection",
        idle=lambda s: s["sat_importance"] not in _SCORED_BY_TOKENS,
        beside="with --sat-importance uniform or magnitude, which look at no token",
    ),
    Rule(
        keys="sat_gqa",
        idle=lambda s: not grouped_queries(s),
        beside="without --group-query-attention and fewer --num-query-groups than heads",
    ),
    Rule(
        keys="train_only_first_id",
        idle=lambda s: s["train_only"] == "all",
        beside="without --train-only new-embeddings",
    ),
    Rule(
        keys="zero_stage deepspeed_config",
        idle=lambda s: s["engine"] != "deepspeed",
        beside="without --engine deepspeed",
    ),
    Rule(
        keys="requeue_exit_code",
        idle=lambda s: not s["exit_signal_handler"],
        beside="without --exit-signal-handler",
    ),
    Rule(
        keys="train_epochs sft_packing sft_too_long",
        idle=lambda s: not s["sft"],
        beside="without --sft, which finetune_sat.py says",
    ),
    Rule(
        keys="replay_data_path replay_share index_timeout_minutes",
        idle=lambda s: s["sft"],
        beside="with --sft, which reads every example once an epoch",
    ),
    Rule(keys="spdf_*", idle=lambda s: s["baseline"] != "spdf", beside="without --baseline spdf"),
    Rule(
        keys="mst_*",
        idle=lambda s: s["baseline"] not in MST,
        beside="without --baseline mst or mst-structured",
    ),
    Rule(
        keys="mst_attention_stride",
        idle=lambda s: s["baseline"] == "mst-structured",
        beside="with --baseline mst-structured, whose attention is dense",
    ),
    Rule(keys="est_*", idle=lambda s: s["baseline"] != "est", beside="without --baseline est"),
    Rule(
        keys="est_layer_rate",
        idle=lambda s: s["est_layers_until"] == 0,
        beside="with --est-layers-until 0, which leaves no layer out",
    ),
    Rule(keys="preflight_timeout", idle=lambda s: s["preflight"] is False, beside="with --no-preflight"),
    Rule(keys="max_bad_steps", idle=lambda s: s["on_bad_step"] == "stop", beside="with --on-bad-step stop"),
    Rule(
        keys="layer_graphs",
        idle=lambda s: s["layer_graphs"] and bool(against_layer_graphs(s)),
        beside=(
            "with model parallelism, recomputation, dropout, biases, --overlap-param-gather, --sft, --baseline mst, "
            "--baseline est"
        ),
    ),
)
"""The method's settings, and this program's own."""

MEGATRON: tuple[Rule, ...] = (
    Rule(
        keys="num_query_groups",
        idle=lambda s: not s["group_query_attention"],
        beside="without --group-query-attention",
    ),
    Rule(
        keys="rotary_* use_rope_scaling rope_scaling_factor apply_rope_fusion no_rope_freq",
        idle=lambda s: s["position_embedding_type"] != "rope",
        beside="without --position-embedding-type rope",
    ),
    Rule(
        keys="rope_scaling_factor",
        idle=lambda s: not s["use_rope_scaling"],
        beside="without --use-rope-scaling",
    ),
    Rule(keys="bias_swiglu_fusion", idle=lambda s: not s["swiglu"], beside="without --swiglu"),
    Rule(
        keys="bias_gelu_fusion",
        idle=lambda s: s["swiglu"] or s["squared_relu"] or not s["add_bias_linear"],
        beside="with --swiglu, --squared-relu or --disable-bias-linear",
    ),
    Rule(
        keys="openai_gelu",
        idle=lambda s: any(s[key] for key in OTHER_ACTIVATIONS),
        beside="with --swiglu, --squared-relu or --quick-geglu",
    ),
    Rule(
        keys="make_vocab_size_divisible_by pad_vocab_size",
        idle=lambda s: s["padded_vocab_size"] is not None,
        beside="with --padded-vocab-size",
    ),
    Rule(keys="lr_*_samples", idle=lambda s: s["train_samples"] is None, beside="without --train-samples"),
    Rule(keys="lr_*_iters", idle=lambda s: s["train_iters"] is None, beside="without --train-iters"),
    Rule(keys="lr_wsd_*", idle=lambda s: s["lr_decay_style"] != "WSD", beside="without --lr-decay-style WSD"),
    Rule(
        keys="loss_scale* initial_loss_scale min_loss_scale hysteresis",
        idle=lambda s: not s["fp16"],
        beside="without --fp16",
    ),
    Rule(keys="adam_*", idle=lambda s: s["optimizer"] in ("sgd", "lion"), beside="with this --optimizer"),
    Rule(keys="sgd_momentum", idle=lambda s: s["optimizer"] != "sgd", beside="without --optimizer sgd"),
    Rule(keys="muon_*", idle=lambda s: "muon" not in s["optimizer"], beside="without --optimizer muon"),
    Rule(keys="lion_*", idle=lambda s: s["optimizer"] != "lion", beside="without --optimizer lion"),
    Rule(keys="soap_*", idle=lambda s: s["optimizer"] != "soap", beside="without --optimizer soap"),
    Rule(
        keys="adaptive_muon_*",
        idle=lambda s: s["optimizer"] != "adaptive_muon",
        beside="without --optimizer adaptive_muon",
    ),
    Rule(
        keys="sequence_parallel",
        idle=lambda s: s["tensor_model_parallel_size"] == 1,
        beside="at --tensor-model-parallel-size 1",
    ),
    Rule(
        keys="overlap_p2p_comm* align_param_gather microbatch_group_size_per_vp_stage",
        idle=lambda s: s["num_virtual_stages_per_pipeline_rank"] is None,
        beside="without an interleaved pipeline (--num-virtual-stages-per-pipeline-rank)",
    ),
    Rule(
        keys="pipeline_model_parallel_comm_backend batch_p2p_sync use_ring_exchange_p2p account_for_*",
        idle=lambda s: s["pipeline_model_parallel_size"] == 1,
        beside="at --pipeline-model-parallel-size 1",
    ),
    Rule(
        keys="num_virtual_stages_per_pipeline_rank",
        idle=lambda s: s["pipeline_model_parallel_layout"] is not None,
        beside="with --pipeline-model-parallel-layout, which says it",
    ),
    Rule(
        keys="recompute_[!g]* distribute_saved_activations",
        idle=lambda s: s["recompute_granularity"] is None,
        beside="without --recompute-granularity",
    ),
    Rule(
        keys="cpu_offloading_[!n]*",
        idle=lambda s: not s["cpu_offloading"],
        beside="without --cpu-offloading-num-layers",
    ),
    Rule(
        keys="optimizer_offload_* use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_* pin_cpu_*",
        idle=lambda s: not s["optimizer_cpu_offload"],
        beside="without --optimizer-cpu-offload",
    ),
    Rule(
        keys="wgrad_deferral_limit",
        idle=lambda s: not s["defer_embedding_wgrad_compute"],
        beside="without --defer-embedding-wgrad-compute",
    ),
    Rule(
        keys="cross_entropy_fusion_impl",
        idle=lambda s: not s["cross_entropy_loss_fusion"],
        beside="without --cross-entropy-loss-fusion",
    ),
    Rule(keys="autocast_dtype", idle=lambda s: not s["enable_autocast"], beside="without --enable-autocast"),
    Rule(
        keys="store_param_remainders",
        idle=lambda s: not s["use_precision_aware_optimizer"],
        beside="without --use-precision-aware-optimizer",
    ),
    Rule(
        keys="eod_mask_loss data_cache_path mmap_bin_files mid_level_dataset_surplus",
        idle=lambda s: s["sft"],
        beside="with --sft, whose samples are whole examples",
    ),
    Rule(keys="exit_signal", idle=lambda s: not s["exit_signal_handler"], beside="without --exit-signal-handler"),
    Rule(keys="save_* async_save", idle=lambda s: s["save"] is None, beside="without --save"),
    Rule(
        keys="finetune load_* ckpt_step exit_on_missing_checkpoint allow_first_loss_apart",
        idle=lambda s: s["load"] is None,
        beside="without --load",
    ),
)
"""Megatron-LM's settings."""


def without_effect(settings: Settings) -> set[str]:
    """Keys of all settings that do nothing beside the others."""
    return {key for rule in (*METHOD, *MEGATRON) for key in rule.found(settings)}


def refuse_idle(settings: Settings, *, given: Collection[str]) -> None:
    """Raise ValueError where one of the method's settings was given and does nothing."""
    for rule in METHOD:
        names = [dashed(key) for key in rule.found(settings) if key in given]
        if names:
            subject = f"{', '.join(names)} {'has' if len(names) == 1 else 'have'}"
            way_out = "leave it out" if len(names) == 1 else "leave them out"
            raise ValueError(f"{subject} no effect {rule.beside}; {way_out}")


def remarks(settings: Settings, *, given: Settings) -> list[str]:
    """One line for each setting that was given and does nothing here, with the reason."""
    flags = table().flags
    lines = [
        f"{spelled(flags[key], given[key])} does nothing here: {flags[key].idle}"
        for key in given
        if flags[key].idle
    ]
    for rule in MEGATRON:
        lines += [
            f"{spelled(flags[key], given[key])} has no effect {rule.beside}"
            for key in rule.found(settings)
            if key in given
        ]
    if given.get("attention_backend") in ("fused", "unfused", "local"):
        lines.append(
            f"--attention-backend {given['attention_backend']} means auto here: flash-attn where it is "
            "installed, else torch's scaled_dot_product_attention"
        )
    return lines


def spelled(flag: Flag, value: object) -> str:
    """The setting as it would be given: its name, or that of its value, and the value."""
    names = [name for name, preset in flag.presets.items() if preset == value]
    if names:
        return names[0]
    said = " ".join(map(str, value)) if isinstance(value, list) else value
    return f"{flag.all_names[0]} {said}"
