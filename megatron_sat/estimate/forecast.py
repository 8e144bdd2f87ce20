"""A whole run in time: seconds a step of every rung, beside the dense run of as many steps, and what memory it takes.

Put together from a resolved configuration, its plan, and what one device was measured to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_sat.build import plan_of, recompute_of
from megatron_sat.config import Config
from megatron_sat.estimate.hardware import FAR, Hardware
from megatron_sat.estimate.step import Batch, Spread, StepTime, layer_seconds, predict_step
from megatron_sat.model.flops import NO_RECOMPUTE, KeptShape, ModelShape, kept_shape
from megatron_sat.plan import Plan, PlannedRung
from megatron_sat.rehearsal.cluster import Cluster
from megatron_sat.rehearsal.memory import GIB, Memory
from megatron_sat.rehearsal.rehearse import layers_by_rank, memory_of

MEASURED_IMPORTANCE = "maxip"
"""The metric whose choosing `benchmarks/bench_layer.py` times: the program's default."""


@dataclass(frozen=True, kw_only=True)
class RungTime:
    """A rung, and a step of it."""

    planned: PlannedRung
    step: StepTime

    @property
    def seconds(self) -> float:
        """Of all its steps."""
        return self.planned.rung.steps * self.step.seconds


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is predicted of a run."""

    rungs: tuple[RungTime, ...]
    dense: StepTime
    """A step of the same run that omits nothing."""
    plan: Plan
    memory: Memory
    hardware: Hardware
    world_size: int
    remarks: tuple[str, ...]
    """What the prediction does not know."""

    @property
    def seconds(self) -> float:
        return sum(rung.seconds for rung in self.rungs)

    @property
    def dense_seconds(self) -> float:
        return self.plan.steps * self.dense.seconds

    @property
    def saved(self) -> float:
        """Share of the dense run's time."""
        return 1 - self.seconds / self.dense_seconds

    def columns(self) -> list[str]:
        """Heads of the table: a rung's steps and rate, a step's seconds, what they go to."""
        names = [name for name, seconds in self.dense.parts().items() if seconds or name == "choosing"]
        return ["steps", "rate", "s/step", "speed", "TFLOP/s a GPU", *names]

    def rows(self) -> list[list[object]]:
        """A row a rung, the dense step last."""
        names = self.columns()[5:]
        found = [self._row(each.planned, each.step, names) for each in self.rungs]
        dense = ["dense", 0.0, round(self.dense.seconds, 4), 1.0, self._rate(self.plan.dense_step_flops, self.dense)]
        return [*found, [*dense, *(round(self.dense.parts()[name], 4) for name in names)]]

    def _row(self, planned: PlannedRung, step: StepTime, names: Sequence[str]) -> list[object]:
        steps = f"{planned.rung.first}-{planned.rung.last}"
        figures = [round(float(planned.rung.rate), 4), round(step.seconds, 4)]
        figures += [round(self.dense.seconds / step.seconds, 3), self._rate(planned.flops, step)]
        return [steps, *figures, *(round(step.parts()[name], 4) for name in names)]

    def _rate(self, flops: int, step: StepTime) -> float:
        return round(flops / step.seconds / self.world_size / 1e12, 1)

    def lines(self) -> list[str]:
        """What stands under the table, a sentence a line."""
        bound = self.plan.time_saving_bound
        hours, dense = self.seconds / 3600, self.dense_seconds / 3600
        speed = self.dense_seconds / self.seconds
        source = self.hardware.about
        return [
            f"{self.plan.steps:,} steps take {hours:.4g} h, dense ones {dense:.4g} h",
            f"{speed:.3f} times as fast, {self.saved:.1%} saved",
            f"operations alone would save {bound:.1%}",
            f"{self.memory.total / GIB:.1f} GiB on the GPU that needs most",
            f"from what {self.hardware.name} was measured to do: {source['command']}, commit {source['commit']}",
            *(f"note: {remark}" for remark in self.remarks),
        ]

    def as_dict(self) -> dict[str, Any]:
        """For machines: plain numbers and strings."""
        return {
            "seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
            "saved": self.saved,
            "bound": self.plan.time_saving_bound,
            "executed_flops": self.plan.flops,
            "dense_flops": self.plan.dense_flops,
            "memory_bytes": dict(self.memory.rows()),
            "dense_step": {"seconds": self.dense.seconds, **self.dense.parts()},
            "rungs": [
                {
                    "first": each.planned.rung.first,
                    "last": each.planned.rung.last,
                    "rate": str(each.planned.rung.rate),
                    "seconds_a_step": each.step.seconds,
                    **each.step.parts(),
                }
                for each in self.rungs
            ],
            "hardware": {"name": self.hardware.name, **self.hardware.about},
            "remarks": list(self.remarks),
        }


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bytes a second that a GPU sends, each way."""

    inside: float
    """To GPUs of its host."""
    across: float | None
    """To other hosts; None: nobody said."""


def forecast(config: Config, *, shape: ModelShape, hardware: Hardware, cluster: Cluster, links: Links) -> Forecast:
    """Predict the run of ``config``, a model of ``shape``.

    Raises ValueError for context parallelism and for DeepSpeed, which the time model does not know, and where replicas
    lie on several hosts and nobody said how fast these are joined.
    """
    spread = spread_of(config, cluster=cluster, links=links)
    plan = plan_of(config, shape=shape, epochs={})

    def step(kept: KeptShape) -> StepTime:
        return step_of(config, shape=shape, kept=kept, hardware=hardware, spread=spread)

    rungs = tuple(RungTime(planned=planned, step=step(planned.kept)) for planned in plan.rungs)
    dense = step(plan.whole)
    return Forecast(
        rungs=rungs,
        dense=dense,
        plan=plan,
        memory=memory_of(config, shape=shape, plan=plan),
        hardware=hardware,
        world_size=cluster.world_size,
        remarks=tuple(_remarks(config, steps=[dense, *(rung.step for rung in rungs)])),
    )


def step_of(
    config: Config, *, shape: ModelShape, kept: KeptShape, hardware: Hardware, spread: Spread
) -> StepTime:
    """A step of the run in which each layer computes ``kept``."""
    training = config.training
    return predict_step(
        shape,
        kept,
        hardware=hardware,
        batch=Batch(micro_batch_size=training.micro_batch_size, micro_batches=training.num_micro_batches),
        spread=spread,
        recompute=recompute_of(config),
        graphs=config.layer_graphs,
        interval=config.selection.selection_interval,
        tied=not config.model.untie_embeddings_and_output_weights,
    )


def layer_of(config: Config, *, shape: ModelShape, rate: Fraction, hardware: Hardware) -> float:
    """Seconds of one layer's micro-batch on one device, with no launch in its way."""
    return layer_seconds(
        shape,
        kept_of(config, shape=shape, rate=rate),
        hardware=hardware,
        batch=Batch(micro_batch_size=config.training.micro_batch_size, micro_batches=1),
        spread=Spread(layers=(1,)),
        recompute=NO_RECOMPUTE,
        seen=[],
    )


def kept_of(config: Config, *, shape: ModelShape, rate: Fraction) -> KeptShape:
    """What the run keeps at ``rate``."""
    selection = config.selection
    return kept_shape(
        shape,
        rate,
        selection_groups=selection.selection_groups,
        channel_multiple=selection.channel_multiple,
        gqa=selection.gqa,
    )


def spread_of(config: Config, *, cluster: Cluster, links: Links) -> Spread:
    """How the run lies on the cluster; see `forecast` for what is refused."""
    parallel, settings = config.parallel, config.settings
    if parallel.context > 1:
        raise ValueError(
            f"--context-parallel-size must be 1 for a prediction, got {parallel.context}: how its gathers overlap was "
            "never measured; predict without it"
        )
    if config.engine != "megatron":
        raise ValueError(f"--engine must be megatron for a prediction, got {config.engine}; predict with megatron")
    model = parallel.tensor * parallel.pipeline
    scattered = parallel.data > 1 and cluster.world_size > cluster.per_host
    if scattered and links.across is None:
        raise ValueError(
            f"--network must say how fast {cluster.hosts} hosts are joined (GB/s that each GPU sends), for on them lie "
            f"{parallel.data} replicas of {model} GPUs; add --network 25 for 200 Gbit/s a GPU"
        )
    across = links.across if scattered and links.across is not None else links.inside
    return Spread(
        layers=layers_by_rank(config),
        virtual=parallel.virtual_pipeline or 1,
        tensor=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        tensor_link=links.inside,
        data=parallel.data,
        data_link=across,
        shards_update=bool(settings.get("use_distributed_optimizer")),
        overlaps_reduction=bool(config.ddp.get("overlap_grad_reduce")),
        sparse_reduction=config.sparse_reduce,
    )


def _remarks(config: Config, *, steps: Sequence[StepTime]) -> list[str]:
    found, selection = [], config.selection
    sparse = config.schedule.kind != "none"
    if sparse and selection.importance != MEASURED_IMPORTANCE:
        found.append(f"choosing was measured for {MEASURED_IMPORTANCE}, not for {selection.importance}")
    if sparse and config.weights != "compact":
        found.append("layers are predicted as packed once a step; --sat-weights gather is slower")
    distance = max(step.distance for step in steps)
    if distance > FAR:
        found.append(
            f"a shape is {distance:.1f} away from all that were measured (4 times in one size is {FAR:.1f}): a guess; "
            "measure it with benchmarks/bench_layer.py --models and --tokens"
        )
    if config.parallel.world_size > 1:
        found.append("communication is by data sheets, not measured")
    return found
