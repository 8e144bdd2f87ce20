"""From a configuration to a run: the only room that constructs, in the order in which things can go wrong.

Text first (tokenizer, data), then the model and its selectors, then the engine; what is wrong with any of them is said
before the first step. `Run` holds the pieces, `training.run` lets them work.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sat import faults, log
from megatron_sat.baselines.course import Course, NoCourse, after_reduction
from megatron_sat.baselines.est import Est
from megatron_sat.baselines.masked_spdf import MaskedSpdf
from megatron_sat.baselines.masks import Masks
from megatron_sat.baselines.matrices import find_matrices
from megatron_sat.baselines.mst import MaskedMst, attentions_of
from megatron_sat.baselines.settings import EstConfig, MstConfig, SpdfConfig
from megatron_sat.config import Config
from megatron_sat.counting import Counted, count_mst, count_spdf
from megatron_sat.data.blend import Datasets, build_datasets
from megatron_sat.data.sft import build_windows
from megatron_sat.data.tokenizer import Tokenizer, build_tokenizer
from megatron_sat.distributed import Layout, initialize_model_parallel
from megatron_sat.engines import deepspeed, foreach
from megatron_sat.engines.base import Engine
from megatron_sat.engines.megatron import MegatronEngine
from megatron_sat.engines.optim import describe_adam, make_optimizer_config
from megatron_sat.layers import compiled, fused, rope
from megatron_sat.layers.attach import attach_selectors
from megatron_sat.layers.available import in_use
from megatron_sat.layers.graphed import record_layers
from megatron_sat.layers.packed import leave_padding_out
from megatron_sat.layers.recording import GpuRecorder, RerunRecorder
from megatron_sat.model.builder import build_chunks, embedding_of
from megatron_sat.model.flops import KeptShape, ModelShape, Recompute, choice_flops, kept_shape, shape_of
from megatron_sat.plan import PassedBy, Plan, build_plan
from megatron_sat.shards import whole_shape, whole_weight
from megatron_sat.sparsity.controller import Controller, sparse_modules
from megatron_sat.sparsity.schedule import build_schedule
from megatron_sat.training.only import NewRows, count_trained, freeze_all_but_vocabulary, train_only
from megatron_sat.vocab.report import first_new_token

GRAIN = 64
"""Positions to whose multiples a micro-batch of padded examples is cut: few lengths, and none that kernels dislike."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that trains, put together and checked."""

    config: Config
    layout: Layout
    device: torch.device
    tokenizer: Tokenizer
    datasets: Datasets
    engine: Engine
    controller: Controller
    shape: ModelShape
    plan: Plan
    grain: int | None = None
    """Padding that all samples of a micro-batch have is cut off, to a multiple of this; None: it is left."""
    new_rows: NewRows | None = None
    """What alone is trained; None: everything."""
    course: Course = field(default_factory=NoCourse)
    """A baseline at work beside the selectors."""


def build_run(config: Config) -> Run:
    """Build on every rank; collective, the default process group exists.

    Raises ValueError for data, tokenizer or model that cannot be used together.
    """
    faults.apply_all()
    fused.install()
    rope.install()
    compiled.install()
    foreach.install()
    if config.engine == "deepspeed":
        deepspeed.library()  # where it is missing, that is said before anything is read
    if config.transformer.get("deterministic_mode"):
        torch.use_deterministic_algorithms(True)  # megatron.core minds the mode in Transformer Engine alone
    parallel = config.parallel
    layout = initialize_model_parallel(
        tp=parallel.tensor,
        pp=parallel.pipeline,
        cp=parallel.context,
        virtual_pp=parallel.virtual_pipeline,
        seed=config.training.seed,
        timeout_minutes=parallel.timeout_minutes,
    )
    tokenizer = build_tokenizer(config.tokenizer.kind, model=config.tokenizer.model, vocab_size=config.model.vocab_size)
    samples = config.training.train_iters * config.training.global_batch_size
    if config.sft is None:
        datasets = build_datasets(config.data, tokenizer=tokenizer, train_samples=samples)
    else:
        datasets = build_windows(config.data, sft=config.sft, tokenizer=tokenizer, train_samples=samples)
    if datasets.train is None:
        raise ValueError(
            f"training needs text, got text for evaluation alone (--split {config.data.split}); "
            "let the first part of --split be above 0"
        )
    transformer = TransformerConfig(**config.transformer)
    embedding = embedding_of(config.model, rows=config.model.rows(tokenizer.vocab_size, tp=parallel.tensor))
    chunks = build_chunks(transformer, embedding)
    rows = _new_rows(config, chunks, tokenizer=tokenizer, layout=layout)
    on_deepspeed = config.engine == "deepspeed"
    attach_selectors(chunks, config=config.selection, layout=layout, whole=whole_weight if on_deepspeed else None)
    if config.sft is not None:
        leave_padding_out(chunks, layout=layout)
    engine = _engine(config, chunks, transformer=transformer, layout=layout)
    if rows is not None:
        train_only(rows, chunks=engine.chunks, hold=engine.hold)
    if config.layer_graphs:
        record_layers(chunks, recorder=GpuRecorder() if torch.cuda.is_available() else RerunRecorder())
    schedule = build_schedule(config.schedule)
    controller = Controller(sparse_modules(chunks), schedule=schedule, interval=config.selection.selection_interval)
    if config.omitted_neurons == "frozen":
        engine.hold(controller.omitted_entries)
    if config.sparse_reduce:
        assert isinstance(engine, MegatronEngine), "the flags refuse it on another engine"
        engine.reduce_only(controller.filled_entries)
    shape = shape_of(transformer, padded_vocab_size=embedding.padded_vocab_size, seq_length=config.model.seq_length)
    return Run(
        config=config,
        layout=layout,
        device=_device(),
        tokenizer=tokenizer,
        datasets=datasets,
        engine=engine,
        controller=controller,
        shape=shape,
        plan=plan_of(config, shape=shape, epochs=datasets.epochs),
        grain=_grain(config),
        new_rows=rows,
        course=_course(config, engine=engine, layout=layout, controller=controller),
    )


def introduce(run: Run) -> None:
    """What a reader must know before the first step, besides the plan."""
    for remark in run.config.remarks:
        log.say(f"note: {remark}")
    transformer = run.config.transformer
    log.say(
        in_use(
            cuda=torch.cuda.is_available(),
            dtype=transformer["params_dtype"],
            gradient_accumulation_fusion=transformer["gradient_accumulation_fusion"],
            optimizer=run.engine.describe() if isinstance(run.engine, deepspeed.DeepSpeedEngine) else describe_adam(),
        )
    )
    parameters = sum(whole_shape(p).numel() for chunk in run.engine.chunks for p in chunk.parameters())
    rows = run.new_rows
    if rows is not None:
        entries = f"{count_trained(rows):,} entries on rank 0"
        log.say(f"only the tokens {rows.first} to {rows.last - 1} are trained: {entries}")
    parallel = run.config.parallel
    log.say(
        f"{parameters:,} parameters on rank 0; {dist.get_world_size()} ranks: tensor {parallel.tensor}, "
        f"pipeline {parallel.pipeline}, context {parallel.context}, data {parallel.data}"
    )


def _new_rows(
    config: Config, chunks: list[torch.nn.Module], *, tokenizer: Tokenizer, layout: Layout
) -> NewRows | None:
    """With --train-only new-embeddings: everything else is frozen, and the rows that are trained."""
    if config.training.train_only == "all":
        return None
    first = config.training.train_only_first_id or first_new_token(Path(config.tokenizer.model or ""))
    return NewRows(
        parameters=freeze_all_but_vocabulary(chunks), first=first, last=tokenizer.vocab_size, tp_rank=layout.tp_rank
    )


def _course(config: Config, *, engine: Engine, layout: Layout, controller: Controller) -> Course:
    """The baseline that the configuration names, tied into the engine's step, or into the selectors'."""
    if config.baseline is None:
        return NoCourse()
    if isinstance(config.baseline, EstConfig):
        return Est(controller.selectors, config=config.baseline, num_layers=config.transformer["num_layers"])
    assert isinstance(engine, MegatronEngine), "the flags refuse it on another engine"
    masks = Masks(find_matrices(engine.chunks, group=layout.tp_group))
    if isinstance(config.baseline, SpdfConfig):
        spdf = MaskedSpdf(masks, config=config.baseline, clear=engine.clear)
        after_reduction(engine.chunks, do=spdf.silence)
        return spdf
    mst = MaskedMst(
        masks,
        config=config.baseline,
        attentions=attentions_of(engine.chunks),
        clear=engine.clear,
        gather_gradients=engine.gather_gradients,
    )
    after_reduction(engine.chunks, do=mst.after_reduction)
    engine.pass_over(lambda: mst.is_change)
    return mst


def _grain(config: Config) -> int | None:
    """Padded examples alone need no whole window; but stages of a pipeline agree on one length beforehand."""
    parallel = config.parallel
    if config.sft is None or config.sft.packing or parallel.pipeline > 1:
        return None
    ranks = (2 * parallel.context if parallel.context > 1 else 1) * (
        parallel.tensor if parallel.sequence_parallel else 1
    )
    return math.lcm(GRAIN, ranks)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _engine(
    config: Config, chunks: list[torch.nn.Module], *, transformer: TransformerConfig, layout: Layout
) -> Engine:
    ddp = DistributedDataParallelConfig(**config.ddp)
    optimizer = make_optimizer_config(config.learning_rate, model=transformer, ddp=ddp, **config.optimizer)
    if config.engine == "deepspeed":
        return deepspeed.DeepSpeedEngine(
            chunks,
            layout=layout,
            optimizer_config=optimizer,
            learning_rate=config.learning_rate,
            settings=config.deepspeed,
            micro_batch_size=config.training.micro_batch_size,
            check_for_nan=ddp.check_for_nan_in_grad,
        )
    return MegatronEngine(
        chunks,
        layout=layout,
        ddp_config=ddp,
        optimizer_config=optimizer,
        learning_rate=config.learning_rate,
        seq_length=config.model.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        align_grad_reduce=config.align_grad_reduce,
    )


def recompute_of(config: Config) -> Recompute:
    """What the backward computes again, for the count of executed operations."""
    transformer = config.transformer
    granularity = transformer.get("recompute_granularity")
    if granularity is None:
        return Recompute()
    if granularity == "selective":
        return Recompute(parts=tuple(transformer.get("recompute_modules") or ("core_attn",)))
    per_chunk = transformer.get("recompute_num_layers") if transformer.get("recompute_method") == "block" else None
    chunks = config.parallel.pipeline * (config.parallel.virtual_pipeline or 1)
    layers = None if per_chunk is None else min(per_chunk * chunks, transformer["num_layers"])
    return Recompute(parts=("full",), layers=layers)


def kept_of(config: Config, *, shape: ModelShape, rate: Fraction) -> KeptShape:
    """What the layers of a run keep at ``rate``."""
    selection = config.selection
    return kept_shape(
        shape,
        rate,
        selection_groups=selection.selection_groups,
        channel_multiple=selection.channel_multiple,
        gqa=selection.gqa,
        modules=selection.modules,
        whole_layers=selection.whole_layers(shape.num_layers),
        omit=selection.omit,
    )


def plan_of(config: Config, *, shape: ModelShape, epochs: Mapping[str, float]) -> Plan:
    """What the run will do. epochs: by domain, passes over it; empty where nobody has looked at the data."""
    training, selection = config.training, config.selection
    choosing = choice_flops(
        shape,
        importance=selection.importance,
        tokens=training.micro_batch_size * config.model.seq_length,
        replicas=config.parallel.data,
        modules=selection.modules,
        whole_layers=selection.whole_layers(shape.num_layers),
    )
    return build_plan(
        build_schedule(config.schedule),
        shape=shape,
        selection_groups=selection.selection_groups,
        channel_multiple=selection.channel_multiple,
        gqa=selection.gqa,
        modules=selection.modules,
        whole_layers=selection.whole_layers(shape.num_layers),
        omit=selection.omit,
        passed_by=_passed_by(config),
        tokens_per_step=training.global_batch_size * config.model.seq_length,
        recompute=recompute_of(config),
        choice_flops=choosing // selection.selection_interval,
        epochs=epochs,
        counted=_counted(config, shape=shape),
    )


def _passed_by(config: Config) -> PassedBy | None:
    """The layers that a step leaves out; None: never any."""
    baseline, layers = config.baseline, config.transformer["num_layers"]
    if not isinstance(baseline, EstConfig) or baseline.kept(layers, step=1) == layers:
        return None
    return PassedBy(layers=layers - baseline.kept(layers, step=1), until=baseline.layers_until)


def _counted(config: Config, *, shape: ModelShape) -> Counted | None:
    training = config.training
    if not isinstance(config.baseline, SpdfConfig | MstConfig):
        return None
    tokens = training.global_batch_size * config.model.seq_length
    if isinstance(config.baseline, SpdfConfig):
        return count_spdf(config.baseline, shape=shape, tokens_per_step=tokens, steps=training.train_iters)
    return count_mst(config.baseline, shape=shape, tokens_per_step=tokens)
