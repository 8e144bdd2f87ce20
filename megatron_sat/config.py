"""One run as one value: every owner's configuration, put together from resolved settings.

`compose` is the only way in: it fills in what depends on the machine and the layout (`flags.defaults`),
refuses contradictions between owners (`flags.checks`, `flags.effects`), and lets each owner check its own.
Nothing is read from the environment: the number of ranks and the machine are arguments.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.init import xavier_uniform_

from megatron_sat.baselines.settings import EstConfig, MstConfig, SpdfConfig
from megatron_sat.data.blend import DataConfig
from megatron_sat.data.sft import SFTConfig
from megatron_sat.engines.optim import LearningRateConfig
from megatron_sat.flags.baselines import baseline_config, check_baseline, growing, phases
from megatron_sat.flags.checks import check, prerequisites
from megatron_sat.flags.deepspeed import deepspeed_settings
from megatron_sat.flags.defaults import Machine, data_parallel_size, resolve
from megatron_sat.flags.effects import refuse_idle, remarks, without_effect
from megatron_sat.flags.fields import DTYPES, keywords
from megatron_sat.flags.finetuning import sft_config
from megatron_sat.flags.flag import Settings
from megatron_sat.flags.safety import check_bad_steps
from megatron_sat.flags.table import table
from megatron_sat.layers.activation import tanh_gelu
from megatron_sat.model.settings import ModelConfig
from megatron_sat.sparsity.schedule import ScheduleConfig, parse_rate
from megatron_sat.sparsity.selector import SelectionConfig
from megatron_sat.training.guard import GuardConfig
from megatron_sat.training.settings import CheckpointConfig, LoggingConfig, TrainingConfig

_THE_MODEL_SAYS = ("fp16", "bf16", "use_distributed_optimizer", "overlap_param_gather")
"""Fields of OptimizerConfig that `engines.optim.make_optimizer_config` takes from the other two."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks are laid out."""

    world_size: int
    tensor: int
    pipeline: int
    context: int
    data: int
    """Replicas: world_size over the product of the three."""
    virtual_pipeline: int | None
    """Model chunks a pipeline rank; None without interleaving."""
    sequence_parallel: bool
    backend: str
    """nccl or gloo."""
    timeout_minutes: int
    """Of the collectives, at least 1."""
    preflight: bool | None = None
    """Compare the ranks and try the network first; None: on more than one host."""
    preflight_timeout: float = 300.0
    """Seconds that a rank may stay silent in it, above 0."""

    def __post_init__(self) -> None:
        if not self.preflight_timeout > 0:
            raise ValueError(f"--preflight-timeout must be above 0 s, got {self.preflight_timeout:g}; leave it out")
        if self.timeout_minutes < 1:
            raise ValueError(
                f"--distributed-timeout-minutes must be at least 1, got {self.timeout_minutes}; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What reads and writes text; `data.tokenizer.build_tokenizer` takes it."""

    kind: str
    """Megatron's ``--tokenizer-type``."""
    model: str | None
    """A SentencePiece file or a Hugging Face folder."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    transformer: dict[str, Any]
    """Keyword arguments of megatron.core's TransformerConfig."""
    ddp: dict[str, Any]
    """Keyword arguments of its DistributedDataParallelConfig."""
    optimizer: dict[str, Any]
    """Those of its OptimizerConfig that neither the model, DDP nor the learning rate says."""
    align_grad_reduce: bool
    """Pipeline stages start their gradient reductions together."""
    engine: str
    deepspeed: dict[str, Any]
    """DeepSpeed's own configuration; empty for another engine."""
    parallel: ParallelConfig
    model: ModelConfig
    learning_rate: LearningRateConfig
    training: TrainingConfig
    guard: GuardConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    sft: SFTConfig | None
    """How instruction data become samples; None: the run trains on text."""
    schedule: ScheduleConfig
    selection: SelectionConfig
    weights: str
    """compact: packed once a step; gather: cut for every micro-batch."""
    layer_graphs: bool
    """Layers are recorded once a rung and replayed."""
    omitted_neurons: str
    """optimizer: momentum and decay go on moving them; frozen: nothing does (eq. 2)."""
    sparse_reduce: bool
    """Replicas send each other the gradients of kept rows and columns alone."""
    baseline: SpdfConfig | MstConfig | EstConfig | None
    """A method that leaves out single weights by masks, or layers; None: no such one."""
    settings: dict[str, Any]
    """What all of this came from, by key, in plain form: what is printed and saved with the run."""
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """One line for each setting that was given and does nothing here."""


def compose(given: Settings, *, machine: Machine, world_size: int) -> Config:
    """The run that ``given`` describes. Raises ValueError for what is missing or cannot be."""
    prerequisites({flag.key: given.get(flag.key, flag.default) for flag in table().working})
    settings = resolve(given, machine=machine, world_size=world_size)
    refuse_idle(settings, given=given)
    check(settings, given=given, machine=machine, world_size=world_size)
    check_bad_steps(settings, given=given)
    check_baseline(settings)
    parallel = _parallel(settings, world_size=world_size)
    training = _training(settings, replicas=parallel.data)
    idle = without_effect(settings)
    config = Config(
        transformer=_transformer(settings),
        ddp=_ddp(settings),
        optimizer={k: v for k, v in keywords(OptimizerConfig, settings).items() if k not in _THE_MODEL_SAYS},
        align_grad_reduce=settings["align_grad_reduce"],
        engine=settings["engine"],
        deepspeed=deepspeed_settings(settings, num_micro_batches=training.num_micro_batches),
        parallel=parallel,
        model=ModelConfig(**_named(ModelConfig, settings)),
        learning_rate=_learning_rate(settings, training=training),
        training=training,
        guard=GuardConfig(**_named(GuardConfig, settings)),
        checkpoint=CheckpointConfig(**_named(CheckpointConfig, settings)),
        logging=LoggingConfig(**_named(LoggingConfig, settings)),
        tokenizer=TokenizerConfig(kind=settings["tokenizer_type"], model=settings["tokenizer_model"]),
        data=_data(settings),
        sft=sft_config(settings),
        schedule=_schedule(settings, training=training),
        selection=SelectionConfig(
            **_named(SelectionConfig, settings, prefix="sat_"), growing=growing(settings, steps=training.train_iters)
        ),
        weights=settings["sat_weights"],
        layer_graphs=settings["layer_graphs"],
        omitted_neurons=settings["sat_omitted_neurons"],
        sparse_reduce=settings["sat_sparse_reduce"],
        baseline=baseline_config(settings, steps=training.train_iters),
        settings={key: value for key, value in settings.items() if value is not None and key not in idle},
        remarks=tuple(remarks(settings, given=given)),
    )
    config.selection.whole_layers(config.transformer["num_layers"])  # refuses to leave none
    _ask_megatron(config)
    return config


def _named(cls: type, settings: Settings, *, prefix: str = "") -> dict[str, Any]:
    """Keyword arguments of the dataclass ``cls``, whose fields are named like the settings."""
    names = [each.name for each in fields(cls)]
    return {name: settings[prefix + name] for name in names if prefix + name in settings}


def _parallel(s: Settings, *, world_size: int) -> ParallelConfig:
    return ParallelConfig(
        world_size=world_size,
        tensor=s["tensor_model_parallel_size"],
        pipeline=s["pipeline_model_parallel_size"],
        context=s["context_parallel_size"],
        data=data_parallel_size(s, world_size=world_size),
        virtual_pipeline=s["num_virtual_stages_per_pipeline_rank"],
        sequence_parallel=s["sequence_parallel"],
        backend=s["distributed_backend"],
        timeout_minutes=s["distributed_timeout_minutes"],
        preflight=s["preflight"],
        preflight_timeout=s["preflight_timeout"],
    )


def _training(s: Settings, *, replicas: int) -> TrainingConfig:
    named = _named(TrainingConfig, s)
    named["train_iters"] = s["train_iters"] or s["train_samples"] // s["global_batch_size"]
    return TrainingConfig(
        **named, num_micro_batches=s["global_batch_size"] // (s["micro_batch_size"] * replicas)
    )


def _transformer(s: Settings) -> dict[str, Any]:
    """TransformerConfig's arguments, with what follows from settings of other names."""
    dtype = DTYPES["bf16" if s["bf16"] else "fp16" if s["fp16"] else "fp32"]
    arguments = keywords(TransformerConfig, s) | {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "num_query_groups": s["num_query_groups"] if s["group_query_attention"] else None,
        "virtual_pipeline_model_parallel_size": s["num_virtual_stages_per_pipeline_rank"],
        "batch_p2p_comm": not s["overlap_p2p_comm"],
        "gated_linear_unit": s["swiglu"] or s["quick_geglu"],
        "bias_activation_fusion": _activation_fusion(s),
        "transformer_impl": "local",
    }
    for key, function in (("swiglu", F.silu), ("squared_relu", squared_relu), ("quick_geglu", quick_gelu)):
        if s[key]:
            arguments["activation_func"] = function
    if s["openai_gelu"] and not arguments["bias_activation_fusion"]:  # the fused kernel computes that form itself
        arguments["activation_func"] = tanh_gelu
    if s["init_method_xavier_uniform"]:
        arguments |= {"init_method": xavier_uniform_, "output_layer_init_method": xavier_uniform_}
    return arguments


def _activation_fusion(s: Settings) -> bool:
    if s["swiglu"]:
        return s["bias_swiglu_fusion"]
    return s["bias_gelu_fusion"] and s["add_bias_linear"] and not s["squared_relu"]


def _ddp(s: Settings) -> dict[str, Any]:
    return keywords(DistributedDataParallelConfig, s) | {
        "grad_reduce_in_fp32": s["accumulate_allreduce_grads_in_fp32"]
    }


def _learning_rate(s: Settings, *, training: TrainingConfig) -> LearningRateConfig:
    """Lengths in samples become whole updates; the schedule itself counts samples again."""
    named = _named(LearningRateConfig, s) | {"train_iters": training.train_iters}
    if s["train_samples"] is not None:
        for what in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
            samples = s[f"{what}_samples"]
            named[f"{what}_iters"] = None if samples is None else samples // training.global_batch_size
    if s["lr_decay_style"] != "WSD":
        named["lr_wsd_decay_iters"] = None
    return LearningRateConfig(**named)


def _data(s: Settings) -> DataConfig:
    paths = {name: tuple(value or ()) for name, value in s.items() if name.endswith("_path")}
    return DataConfig(**_named(DataConfig, {**s, **paths, "data_cache_path": s["data_cache_path"]}))


def _schedule(s: Settings, *, training: TrainingConfig) -> ScheduleConfig:
    rate = s["sat_omission_rate"]
    return ScheduleConfig(
        kind=s["sat_schedule"],
        omission_rate=None if rate is None else parse_rate(rate),
        start=s["sat_schedule_start"],
        rungs=s["sat_rungs"],
        train_iters=training.train_iters,
        **(phases(s) if s["sat_schedule"] == "mst" else {}),
    )


def _ask_megatron(config: Config) -> None:
    """Raise ValueError with megatron.core's own words where one of its classes refuses its part."""
    parts: Mapping[type, dict[str, Any]] = {
        TransformerConfig: config.transformer,
        DistributedDataParallelConfig: config.ddp,
        OptimizerConfig: config.optimizer
        | {"use_distributed_optimizer": config.ddp["use_distributed_optimizer"]},
    }
    for cls, arguments in parts.items():
        try:
            cls(**arguments)
        except (ValueError, AssertionError, RuntimeError, ImportError) as error:
            raise ValueError(
                f"megatron.core's {cls.__name__} refuses these settings: {error}; change the flags it names"
            ) from error
