"""The checks between settings of different owners, on the machine and the number of ranks at hand.

What one field alone can get wrong its own dataclass refuses; what megatron.core's classes refuse they say
themselves. Every message gives the name, the rule, the value and the way out.
"""

import math
from collections.abc import Callable
from typing import Any

from megatron_sat.flags.deepspeed import check_engine
from megatron_sat.flags.defaults import OTHER_ACTIVATIONS, Machine, data_parallel_size
from megatron_sat.flags.effects import grouped_queries
from megatron_sat.flags.flag import Settings, dashed
from megatron_sat.flags.replicas import check_replicas

_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "max_position_embeddings",
    "micro_batch_size",
    "lr",
    "tokenizer_type",
)
_AT_LEAST_ONE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "micro_batch_size",
    "global_batch_size",
    "sat_selection_groups",
)


def prerequisites(settings: Settings) -> None:
    """Raise ValueError where a required setting is missing, or a size that others need is not positive.

    settings: what was given, over the defaults of the table.
    """
    for key in _REQUIRED:
        if settings[key] is None:
            raise ValueError(f"{dashed(key)} is required and not given; add it")
    if (settings["train_iters"] is None) == (settings["train_samples"] is None):
        said = "neither" if settings["train_iters"] is None else "both"
        raise ValueError(f"one of --train-iters and --train-samples is required, got {said}; give one")
    if not (settings["data_path"] or settings["train_data_path"]):
        raise ValueError(
            "data are required, got neither --data-path nor --train-data-path; prepare text with "
            "tools/preprocess_data.py and name it"
        )
    for key in _AT_LEAST_ONE:
        if settings[key] is not None and settings[key] < 1:
            raise ValueError(f"{dashed(key)} must be at least 1, got {settings[key]}")
    if settings["kv_channels"] is None:
        heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
        _must_divide("--num-attention-heads", heads, "--hidden-size", hidden)
    chunks = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
    twice = [dashed(key) for key in (*chunks, "pipeline_model_parallel_layout") if settings[key] is not None]
    if len(twice) > 1:
        raise ValueError(f"{' and '.join(twice)} say the same thing, got both; leave one out")


def check(settings: Settings, *, given: Settings, machine: Machine, world_size: int) -> None:
    """Raise ValueError for the first contradiction among resolved ``settings``.

    given: what they were resolved from; it has what does nothing here too.
    """
    _check_program(settings)
    _check_architecture(settings)
    _check_machine({**given, **settings}, machine=machine)
    _check_ranks(settings, world_size=world_size)
    _check_stages(settings)
    _check_lengths(settings)
    _check_batch(settings, world_size=world_size)
    _check_interleaving(settings, world_size=world_size)
    _check_gradients(settings)
    _check_part(settings)
    if settings["sat_schedule"] != "none":
        _check_choice(settings, world_size=world_size)
        _check_quotas(settings)


def query_groups(settings: Settings) -> int:
    """Query groups of the model: its heads without grouped-query attention."""
    return settings["num_query_groups" if settings["group_query_attention"] else "num_attention_heads"]


def _must_divide(part: str, parts: int, whole: str, number: int) -> None:
    if number % parts:
        fits = math.gcd(parts, number)
        raise ValueError(f"{part} ({parts}) must divide {whole} ({number}); try {part} {fits}")


def _up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _check_program(s: Settings) -> None:
    check_engine(s)
    if s["ckpt_format"] != "torch_dist":
        raise ValueError(
            f"--ckpt-format must be torch_dist, which fits any parallel layout, got {s['ckpt_format']}; leave it out"
        )


def _check_architecture(s: Settings) -> None:
    activations = [dashed(key) for key in (*OTHER_ACTIVATIONS, "openai_gelu") if s[key]]
    if len(activations) > 1:
        raise ValueError(f"an MLP has one activation, got {' and '.join(activations)}; leave one out")
    if not activations and s["add_bias_linear"] and s["bias_gelu_fusion"]:
        raise ValueError(
            "--bias-gelu-fusion computes GELU's tanh form, which is --openai-gelu, got --no-openai-gelu beside it; "
            "leave one of them out"
        )
    if s["fp16"] and s["bf16"]:
        raise ValueError("--bf16 and --fp16 exclude each other, got both; leave one out")
    if s["fp16_lm_cross_entropy"] and not s["fp16"]:
        raise ValueError("--fp16-lm-cross-entropy needs --fp16, got it without; leave it out")
    if s["group_query_attention"]:
        heads = s["num_attention_heads"]
        _must_divide("--num-query-groups", s["num_query_groups"], "--num-attention-heads", heads)


_LIBRARIES: dict[str, Callable[[Machine], bool]] = {
    "": lambda machine: machine.cuda,
    "flash-attn": lambda machine: machine.flash_attn,
    "Transformer Engine": lambda machine: machine.transformer_engine,
    "apex": lambda machine: machine.apex,
}
_ON_A_GPU: tuple[tuple[str, Any, str], ...] = (
    ("attention_backend", "flash", "flash-attn"),
    ("apply_rope_fusion", True, "Transformer Engine"),
    ("memory_efficient_layer_norm", True, "apex"),
    ("cpu_offloading", True, "Transformer Engine"),
    ("use_precision_aware_optimizer", True, "Transformer Engine"),
    ("cross_entropy_fusion_impl", "te", "Transformer Engine"),
    ("cross_entropy_loss_fusion", True, ""),
    ("masked_softmax_fusion", True, ""),
    ("distributed_backend", "nccl", ""),
    ("pipeline_model_parallel_comm_backend", "nccl", ""),
    ("pipeline_model_parallel_comm_backend", "ucc", ""),
    ("optimizer_cpu_offload", True, ""),
    ("use_ring_exchange_p2p", True, ""),
    ("deallocate_pipeline_outputs", True, ""),
    ("nccl_ub", True, ""),
)
"""(key, value, library): a value that only a GPU serves, and the library it needs there ("": none)."""


def _check_machine(s: Settings, *, machine: Machine) -> None:
    for key, value, library in _ON_A_GPU:
        if s.get(key) != value:
            continue
        said = dashed(key) if value is True else f"{dashed(key)} {value}"
        said += " (or --use-flash-attn)" if key == "attention_backend" else ""
        if not machine.cuda:
            raise ValueError(f"{said} needs a GPU, this machine has none; leave it out")
        if not _LIBRARIES[library](machine):
            raise ValueError(f"{said} needs {library}, which cannot be imported; install it or leave it out")
    if s["optimizer"] not in ("adam", "sgd") and not machine.emerging_optimizers:
        raise ValueError(
            f"--optimizer {s['optimizer']} needs megatron-core 0.19 and the emerging-optimizers package, got "
            "neither or one; install them or use --optimizer adam"
        )


def _check_ranks(s: Settings, *, world_size: int) -> None:
    tp, pp = s["tensor_model_parallel_size"], s["pipeline_model_parallel_size"]
    cp = s["context_parallel_size"]
    if world_size % (tp * pp * cp):
        raise ValueError(
            f"the number of ranks ({world_size}) must be a multiple of --tensor-model-parallel-size x "
            f"--pipeline-model-parallel-size x --context-parallel-size ({tp} x {pp} x {cp}); start "
            f"{_up(world_size, tp * pp * cp)} ranks"
        )
    sizes = (
        ("--num-attention-heads", s["num_attention_heads"]),
        ("--num-query-groups", query_groups(s)),
        ("--ffn-hidden-size", s["ffn_hidden_size"]),
        ("--padded-vocab-size", s["padded_vocab_size"] or 0),
    )
    for name, number in sizes:
        _must_divide("--tensor-model-parallel-size", tp, name, number)


def _check_stages(s: Settings) -> None:
    """Whole layers in every chunk, where the pipeline is cut evenly; megatron.core checks the other cuts."""
    pp, chunks = s["pipeline_model_parallel_size"], s["num_virtual_stages_per_pipeline_rank"]
    if chunks == 0 or (chunks is not None and pp == 1):
        raise ValueError(
            "interleaving needs --pipeline-model-parallel-size above 1 and a layer in every chunk, "
            f"got {pp} rank(s) and {s['num_layers']} layers; leave the virtual stages out"
        )
    uneven = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    if any(s[key] is not None for key in (*uneven, "pipeline_model_parallel_layout")):
        return
    layers = s["num_layers"]
    layers += s["account_for_embedding_in_pipeline_split"] + s["account_for_loss_in_pipeline_split"]
    if layers % (pp * (chunks or 1)):
        raise ValueError(
            f"--num-layers ({s['num_layers']}) must fill {pp} pipeline ranks of {chunks or 1} chunks evenly; "
            "change --num-virtual-stages-per-pipeline-rank or set --decoder-first-pipeline-num-layers"
        )


def _check_lengths(s: Settings) -> None:
    length, tp, cp = s["seq_length"], s["tensor_model_parallel_size"], s["context_parallel_size"]
    if s["max_position_embeddings"] < length:
        raise ValueError(
            f"--max-position-embeddings must be at least --seq-length ({length}), got "
            f"{s['max_position_embeddings']}; raise it"
        )
    parts = (2 * cp if cp > 1 else 1) * (tp if s["sequence_parallel"] else 1)
    if length % parts:
        raise ValueError(
            f"--seq-length ({length}) must be a multiple of {parts}: twice the context-parallel size, times "
            f"the tensor-parallel size under --sequence-parallel; try {_up(length, parts)}"
        )


def _check_batch(s: Settings, *, world_size: int) -> None:
    replicas, micro = data_parallel_size(s, world_size=world_size), s["micro_batch_size"]
    batch, samples = s["global_batch_size"], s["train_samples"]
    if batch % (micro * replicas):
        raise ValueError(
            f"--global-batch-size ({batch}) must be a multiple of --micro-batch-size x replicas "
            f"({micro} x {replicas}); try {_up(batch, micro * replicas)}"
        )
    if samples is not None and samples < batch:
        raise ValueError(
            f"--train-samples ({samples}) must be at least --global-batch-size ({batch}), one update; raise it"
        )
    unit, other = ("iters", "samples") if samples is None else ("samples", "iters")
    for what in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        length, name = s[f"{what}_{other}"], dashed(f"{what}_{other}")
        if length:
            raise ValueError(f"{name} ({length}) needs --train-{other}; use {dashed(f'{what}_{unit}')}")


def _check_interleaving(s: Settings, *, world_size: int) -> None:
    """As many micro-batches as the chunks of an interleaved pipeline pass on at a time."""
    if s["num_virtual_stages_per_pipeline_rank"] is None:
        return
    pp, group = s["pipeline_model_parallel_size"], s["microbatch_group_size_per_vp_stage"]
    group = pp if group is None else group
    if group < pp:
        raise ValueError(
            f"--microbatch-group-size-per-virtual-pipeline-stage ({group}) must be at least "
            f"--pipeline-model-parallel-size ({pp}); leave it out"
        )
    one = s["micro_batch_size"] * data_parallel_size(s, world_size=world_size)
    rounds, rest = divmod(s["global_batch_size"] // one, group)
    if rounds == 0 or 0 < rest < pp:
        raise ValueError(
            f"an interleaved pipeline of {pp} ranks passes on {group} micro-batches at a time, got "
            f"{rounds * group + rest} in a step; try --global-batch-size {(rounds + 1) * group * one}"
        )


def _check_gradients(s: Settings) -> None:
    if s["accumulate_allreduce_grads_in_fp32"] and s["grad_reduce_in_bf16"]:
        raise ValueError(
            "--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32 exclude each other, got both; leave one out"
        )
    if s["overlap_param_gather"] and not (s["use_distributed_optimizer"] and s["overlap_grad_reduce"]):
        raise ValueError(
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce, got it "
            "without; add them"
        )
    if s["sat_omitted_neurons"] == "frozen" and s["optimizer"] != "adam":
        raise ValueError(
            f"--sat-omitted-neurons frozen needs --optimizer adam, got {s['optimizer']}; use "
            "--sat-omitted-neurons optimizer"
        )


def _check_part(s: Settings) -> None:
    if s["train_only"] != "all" and s["sat_schedule"] != "none":
        raise ValueError(
            f"--train-only {s['train_only']} needs --sat-schedule none, got {s['sat_schedule']}: heads and channels "
            "are not trained at all; make it a stage of its own before the sparse run"
        )


def _check_choice(s: Settings, *, world_size: int) -> None:
    if s["sat_importance"] == "uniform" and s["sat_selection"] == "top-k":
        raise ValueError(
            "--sat-selection top-k needs scores that differ, got --sat-importance uniform, which would keep "
            "the first neurons forever; use --sat-selection sampling"
        )
    if s["sat_weights"] == "compact" and not s["gradient_accumulation_fusion"]:
        raise ValueError(
            "--sat-weights compact needs --gradient-accumulation-fusion, got it off: packed gradients add up in the "
            "product; leave one of them out"
        )
    check_replicas(s, world_size=world_size)
    steps = s["train_iters"] or s["train_samples"] // s["global_batch_size"]
    if s["sat_selection_interval"] > steps:
        raise ValueError(
            f"--sat-selection-interval ({s['sat_selection_interval']}) must be at most --train-iters "
            f"({steps}); {steps} keeps one choice throughout"
        )


def _check_quotas(s: Settings) -> None:
    groups, channels = s["sat_selection_groups"], s["ffn_hidden_size"]
    if groups % s["tensor_model_parallel_size"]:
        raise ValueError(
            f"--sat-selection-groups ({groups}) must be a multiple of --tensor-model-parallel-size "
            f"({s['tensor_model_parallel_size']}); try {s['tensor_model_parallel_size']}"
        )
    if s["sat_gqa"] == "group" or not grouped_queries(s):
        _must_divide("--sat-selection-groups", groups, "--num-query-groups", query_groups(s))
    _must_divide("--sat-selection-groups", groups, "--ffn-hidden-size", channels)
    if s["sat_channel_multiple"] > channels // groups:
        raise ValueError(
            f"--sat-channel-multiple ({s['sat_channel_multiple']}) must be at most the channels of a "
            f"selection group ({channels // groups}); lower it or --sat-selection-groups"
        )
