"""A run rehearsed for a cluster that is not here: ``--dry-run --world-size 32 --gpu a800``.

Everything that settings alone decide is decided as in the run itself (`config.compose`), for that many ranks and that
GPU; then it is said: configuration, layout, plan, memory, and which of the files it names are on this machine. No GPU,
no data and no checkpoint is needed. The cluster is taken to have what the settings insist on of flash-attn and apex,
and not Transformer Engine.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_sat import cli, log
from megatron_sat.build import plan_of, recompute_of
from megatron_sat.checkpoint.folder import RELEASE, TRACKER
from megatron_sat.config import Config
from megatron_sat.data.blend import survey_data
from megatron_sat.data.domains import parse_domains
from megatron_sat.data.index_file import bin_path, idx_path
from megatron_sat.data.sft import count_epochs
from megatron_sat.data.survey import epochs_per_domain
from megatron_sat.data.tokenizer import build_tokenizer
from megatron_sat.engines.sparse_reduce import bytes_beside
from megatron_sat.engines.zero_settings import offloads
from megatron_sat.flags.defaults import Machine
from megatron_sat.model.flops import ModelShape
from megatron_sat.plan import Plan, show
from megatron_sat.rehearsal.cluster import Cluster, remarks
from megatron_sat.rehearsal.memory import GIB, Beside, Bytes, Cut, Memory, Shards, Work, estimate

PRETENDED = Machine(cuda=True, flash_attn=True, apex=True)
"""What the cluster's hosts are taken to have."""


def rehearsal(argv: Sequence[str], *, world_size: int, speaks: bool) -> tuple[int | None, list[str]]:
    """The exit code of a --dry-run, which is over then; or None, and the command line of the run.

    world_size: as many ranks as there are. speaks: whether this process says what is wrong.
    """
    try:
        cluster, rest = take(argv, world_size=world_size)
    except ValueError as error:
        if speaks:
            sys.stderr.write(f"error: {error}\n")
        return cli.USAGE_ERROR, []
    return (None if cluster is None else rehearse(cluster, rest)), rest


def take(argv: Sequence[str], *, world_size: int) -> tuple[Cluster | None, list[str]]:
    """The cluster to rehearse for (None: this is a run), and the command line without what says so.

    Raises ValueError for a cluster that cannot be, and where it is described without --dry-run.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--gpu")
    parser.add_argument("--gpus-per-host", type=int)
    asked, rest = parser.parse_known_args(list(argv))
    if not asked.dry_run:
        for name in ("world_size", "gpu", "gpus_per_host"):
            if getattr(asked, name) is not None:
                said = "--" + name.replace("_", "-")
                raise ValueError(f"{said} describes the cluster of a --dry-run, got it without; add --dry-run")
        return None, rest
    cluster = Cluster(
        gpu=asked.gpu or "a100",
        world_size=world_size if asked.world_size is None else asked.world_size,
        per_host=8 if asked.gpus_per_host is None else asked.gpus_per_host,
    )
    return cluster, rest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.replace("argument ", "", 1))


def rehearse(cluster: Cluster, argv: Sequence[str]) -> int:
    """Say what the run of ``argv`` would be on ``cluster``. Returns the exit code; 2 where it cannot be."""
    try:
        config = cli.parse(argv, world_size=cluster.world_size, cuda=True, machine=PRETENDED)
    except cli.ParsedExit as asked:
        return int(asked.code or 0)
    try:
        rows, guess = vocabulary_rows(config)
        shape = model_shape(config, rows=rows)
        plan = plan_of(config, shape=shape, epochs=_epochs(config))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return cli.USAGE_ERROR
    memory = memory_of(config, shape=shape, plan=plan)
    log.say("".join(f"# {line}\n" for line in config.remarks) + cli.as_yaml(config.settings))
    for line in _layout(config, cluster=cluster):
        log.say(line)
    if guess:
        log.say(guess)
    show(plan)
    _say_memory(memory, cluster=cluster)
    for line in remarks(cluster, shape, tensor=config.parallel.tensor, least_kept=_least_kept(plan)):
        log.say(line)
    _say_paths(paths(config))
    if memory.total > cluster.usable:
        sys.stderr.write(f"error: {_too_much(memory, cluster=cluster)}\n")
        return cli.USAGE_ERROR
    log.say(f"dry run: the settings fit each other and {cluster.world_size} {cluster.gpu}; nothing was run")
    return 0


def memory_of(config: Config, *, shape: ModelShape, plan: Plan) -> Memory:
    """The estimate for a resolved run."""
    parallel, transformer = config.parallel, config.transformer
    weight = transformer["params_dtype"].itemsize
    gradient = 4 if config.ddp.get("grad_reduce_in_fp32") else weight
    chunks = parallel.virtual_pipeline or 1
    return estimate(
        shape,
        cut=Cut(
            tensor=parallel.tensor,
            context=parallel.context,
            layers=layers_by_rank(config),
            virtual=chunks,
            in_flight=transformer.get("microbatch_group_size_per_vp_stage"),
            sequence_parallel=parallel.sequence_parallel,
        ),
        size=Bytes(weight=weight, gradient=gradient, optimizer=_optimizer_bytes(config, weight=weight)),
        shards=_shards(config, weight=weight, gradient=gradient),
        work=Work(
            micro_batch_size=config.training.micro_batch_size,
            num_micro_batches=config.training.num_micro_batches,
            recompute=recompute_of(config),
            recompute_unit=transformer.get("recompute_num_layers") or 1
            if transformer.get("recompute_method") == "uniform"
            else 1,
            fused_swiglu=bool(transformer.get("bias_activation_fusion")),
            dropout=bool(transformer.get("hidden_dropout")),
            beside=beside_of(config),
        ),
        kept=[planned.kept for planned in plan.rungs],
        packs=config.weights == "compact",
        tied=not config.model.untie_embeddings_and_output_weights,
    )


def beside_of(config: Config) -> Beside:
    """What the settings give a model besides a Llama's parameters."""
    transformer, positions = config.transformer, config.model.position_embedding_type
    return Beside(
        linear_biases=bool(transformer.get("add_bias_linear")),
        qkv_biases=bool(transformer.get("add_qkv_bias")),
        norm_biases=transformer.get("normalization") == "LayerNorm",
        positions=config.model.max_position_embeddings if positions == "learned_absolute" else 0,
        rotates=positions == "rope",
    )


def layers_by_rank(config: Config) -> tuple[int, ...]:
    """Layers of each pipeline rank; a layout given as text is taken to be even."""
    s, ranks, layers = config.transformer, config.parallel.pipeline, config.transformer["num_layers"]
    first, last = s.get("num_layers_in_first_pipeline_stage"), s.get("num_layers_in_last_pipeline_stage")
    ends = [number for number in (first, last) if number is not None]
    if ends and ranks > len(ends):
        middle = (layers - sum(ends)) // (ranks - len(ends))
        counts = [middle] * (ranks - len(ends))
        return (*([] if first is None else [first]), *counts, *([] if last is None else [last]))
    base, more = divmod(layers, ranks)
    return tuple(base + (rank < more) for rank in range(ranks))


def _shards(config: Config, *, weight: int, gradient: int) -> Shards:
    """Over how many ranks each part of the state lies; DeepSpeed's buffers by its defaults, or its file."""
    replicas = config.parallel.data * config.parallel.context
    if config.engine == "megatron":
        return Shards(
            optimizer=replicas if config.settings.get("use_distributed_optimizer") else 1,
            buffers=bytes_beside(replicas, itemsize=gradient) if config.sparse_reduce else 0,
        )
    zero = config.deepspeed["zero_optimization"]
    stage = zero["stage"]
    numbers = [zero.get(name, default) for name, default in _BUCKETS.items() if stage == 3 or name in _BUCKETS_BEFORE_3]
    return Shards(
        weights=replicas if stage == 3 else 1,
        gradients=replicas if stage >= 2 else 1,
        optimizer=replicas if stage >= 1 else 1,
        buffers=sum(int(float(number)) for number in numbers) * weight if stage else 0,
    )


_BUCKETS = {
    "reduce_bucket_size": 5e8,
    "stage3_max_live_parameters": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
}
"""Numbers that DeepSpeed holds at once on their way, and its defaults."""
_BUCKETS_BEFORE_3 = ("reduce_bucket_size",)


def _optimizer_bytes(config: Config, *, weight: int) -> int:
    """Of one parameter: fp32 master weights where the model's are shorter, and the moments; 0 on the host."""
    settings = config.settings
    if config.deepspeed and "offload_optimizer" in offloads(config.deepspeed):
        return 0
    moments = 4 * (settings.get("sgd_momentum", 0.9) > 0) if settings["optimizer"] == "sgd" else 8
    return moments + (4 if weight < 4 else 0)


def _least_kept(plan: Plan) -> float:
    return min(planned.step_flops / plan.dense_step_flops for planned in plan.rungs)


# -- what the files say, where they are here


@dataclass(frozen=True, kw_only=True)
class Named:
    """A path that the settings name."""

    setting: str
    path: str
    there: bool


def paths(config: Config) -> list[Named]:
    """Every path that the run reads, and whether it is on this machine; --save is written and need not be."""
    found = []
    if config.tokenizer.model is not None:
        there = Path(config.tokenizer.model).exists()
        found.append(Named(setting="--tokenizer-model", path=config.tokenizer.model, there=there))
    for key in ("data_path", "train_data_path", "valid_data_path", "test_data_path", "replay_data_path"):
        flag = "--" + key.replace("_", "-")
        for domain in parse_domains(getattr(config.data, key), flag=flag) if getattr(config.data, key) else ():
            there = bin_path(domain.prefix).is_file() and idx_path(domain.prefix).is_file()
            found.append(Named(setting=flag, path=f"{domain.prefix}.bin, .idx", there=there))
    if config.checkpoint.load is not None:
        root = Path(config.checkpoint.load)
        there = (root / TRACKER).is_file() or (root / RELEASE).is_dir()
        found.append(Named(setting="--load", path=f"{root}/{TRACKER}", there=there))
    return found


def _say_paths(named: Sequence[Named]) -> None:
    missing = [each for each in named if not each.there]
    for each in missing:
        log.say(f"not on this machine: {each.setting} {each.path}")
    log.say(f"{len(named) - len(missing)} of {len(named)} paths are on this machine; the hosts of the run need all")


def vocabulary_rows(config: Config) -> tuple[int, str]:
    """Rows of the embedding, and how they were come by where the tokenizer is not here.

    Raises ValueError where nothing says how many.
    """
    model, tokenizer = config.model, config.tokenizer
    tp = config.parallel.tensor
    if tokenizer.model is None or Path(tokenizer.model).exists():
        size = build_tokenizer(tokenizer.kind, model=tokenizer.model, vocab_size=model.vocab_size).vocab_size
        return model.rows(size, tp=tp), ""
    given = model.padded_vocab_size or model.vocab_size
    if given is None:
        raise ValueError(
            f"--tokenizer-model ({tokenizer.model}) must be on this machine where neither --vocab-size nor "
            "--padded-vocab-size is given; add one of them"
        )
    rows = model.rows(given, tp=tp)
    return rows, f"the tokenizer is not on this machine: the vocabulary is taken to have {rows} rows"


def model_shape(config: Config, *, rows: int) -> ModelShape:
    """What the settings say of the model, with so many rows of vocabulary."""
    t = config.transformer
    return ModelShape(
        num_layers=t["num_layers"],
        hidden_size=t["hidden_size"],
        num_attention_heads=t["num_attention_heads"],
        num_query_groups=t.get("num_query_groups") or t["num_attention_heads"],
        kv_channels=t["kv_channels"],
        ffn_hidden_size=t["ffn_hidden_size"],
        gated=t["gated_linear_unit"],
        padded_vocab_size=rows,
        seq_length=config.model.seq_length,
    )


def _epochs(config: Config) -> dict[str, float]:
    """By domain, where all data and the tokenizer are here; nothing otherwise.

    Raises ValueError for data that are here and cannot be used.
    """
    if not all(each.there for each in paths(config) if each.setting != "--load"):
        return {}
    kind, model, vocab_size = config.tokenizer.kind, config.tokenizer.model, config.model.vocab_size
    tokenizer = build_tokenizer(kind, model=model, vocab_size=vocab_size)
    samples = config.training.train_iters * config.training.global_batch_size
    if config.sft is not None:
        return count_epochs(config.data, sft=config.sft, tokenizer=tokenizer, train_samples=samples)
    survey = survey_data(config.data, tokenizer=tokenizer)
    return epochs_per_domain(survey.train, samples=samples, seq_length=config.model.seq_length)


# -- what is said


def _layout(config: Config, *, cluster: Cluster) -> list[str]:
    cut, training = config.parallel, config.training
    ranks = f"{cluster.world_size} {cluster.gpu} on {cluster.hosts} host(s)"
    sizes = f"tensor {cut.tensor} x pipeline {cut.pipeline} x context {cut.context} x data {cut.data}"
    batch = f"{training.micro_batch_size} samples x {cut.data} replicas x {training.num_micro_batches} micro-batches"
    return [f"{ranks} = {sizes}", f"global batch {training.global_batch_size} = {batch}"]


def _say_memory(memory: Memory, *, cluster: Cluster) -> None:
    where = f"pipeline rank {memory.stage}" if memory.stage else "one GPU"
    rows = [[name, f"{number / GIB:.2f}"] for name, number in memory.rows()]
    log.table(f"memory of {where}, an estimate", ["part", "GiB"], rows)
    share = memory.total / cluster.kind.memory
    log.say(f"{memory.total / GIB:.1f} GiB of {cluster.kind.memory / GIB:.1f}: {share:.0%} of the {cluster.gpu}")


def _too_much(memory: Memory, *, cluster: Cluster) -> str:
    article = "an" if cluster.gpu[0] in "ah" else "a"
    return (
        f"a GPU must hold the estimate with room to spare ({cluster.usable / GIB:.1f} GiB of {article} {cluster.gpu}), "
        f"got {memory.total / GIB:.1f} GiB; try a smaller --micro-batch-size, --use-distributed-optimizer, more "
        "--tensor-model-parallel-size or --pipeline-model-parallel-size, or --recompute-granularity"
    )
