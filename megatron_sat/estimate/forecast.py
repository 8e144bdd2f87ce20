"""A whole run in time: seconds a step of every rung, beside the dense run of as many steps, and what memory it takes.

Put together from a resolved configuration, its plan, and what one device was measured to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from megatron_sat.build import kept_of, plan_of, recompute_of
from megatron_sat.config import Config
from megatron_sat.estimate.hardware import FAR, Hardware
from megatron_sat.estimate.links import Links
from megatron_sat.estimate.step import Batch, Spread, StepTime, layer_seconds, predict_step
from megatron_sat.model.flops import NO_RECOMPUTE, KeptShape, ModelShape
from megatron_sat.plan import Plan, PlannedRung, span, stretches
from megatron_sat.rehearsal.cluster import Cluster
from megatron_sat.rehearsal.memory import GIB, Memory
from megatron_sat.rehearsal.rehearse import beside_of, layers_by_rank, memory_of

MEASURED_IMPORTANCE = "maxip"
"""The metric whose choosing `benchmarks/bench_layer.py` times: the paper's."""
WORTH_SAYING = 0.02
"""Of a run's time: what --layer-graphs must save to be named."""


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
        """Heads of the table of rungs."""
        return ["steps", "rate", "s/step", "speed", "TFLOP/s a GPU"]

    def rows(self) -> list[list[object]]:
        """A row a rung (of too many, a row a stretch of them, with the mean of its steps), the dense step last."""
        dense = self._figures(self.dense.seconds, flops=self.plan.dense_step_flops)
        return [*(self._row(stretch) for stretch in stretches(self.rungs)), ["dense", "0", *dense]]

    def _row(self, stretch: Sequence[RungTime]) -> list[object]:
        first, last = stretch[0].planned.rung, stretch[-1].planned.rung
        steps = sum(each.planned.rung.steps for each in stretch)
        flops = sum(each.planned.rung.steps * each.planned.flops for each in stretch) / steps
        figures = self._figures(sum(each.seconds for each in stretch) / steps, flops=flops)
        return [f"{first.first}-{last.last}", span(first.rate, last.rate), *figures]

    def _figures(self, seconds: float, *, flops: float) -> list[object]:
        rate = flops / seconds / self.world_size / 1e12
        return [round(seconds, 4), round(self.dense.seconds / seconds, 3), round(rate, 1)]

    def parts(self) -> list[list[object]]:
        """What a step's milliseconds go to: part, in the dense step, in one of the first rung."""
        first = self.rungs[0].step.parts()
        found = [(name, seconds, first[name]) for name, seconds in self.dense.parts().items()]
        return [[name, *(round(1e3 * each, 2) for each in both)] for name, *both in found if any(both)]

    def lines(self) -> list[str]:
        """What stands under the table, a sentence a line."""
        bound = self.plan.time_saving_bound
        hours, dense = self.seconds / 3600, self.dense_seconds / 3600
        speed = self.dense_seconds / self.seconds
        source = self.hardware.about
        return [
            f"{self.plan.steps:,} settled steps take {hours:.4g} h, dense ones {dense:.4g} h",
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


def forecast(config: Config, *, shape: ModelShape, hardware: Hardware, cluster: Cluster, links: Links) -> Forecast:
    """Predict the run of ``config``, a model of ``shape``.

    Raises ValueError for context parallelism and for DeepSpeed, which the time model does not know, and where replicas
    lie on several hosts and nobody said how fast these are joined.
    """
    spread = spread_of(config, cluster=cluster, links=links)
    plan = plan_of(config, shape=shape, epochs={})

    @cache
    def step(kept: KeptShape, graphs: bool) -> StepTime:
        return step_of(config, shape=shape, kept=kept, hardware=hardware, spread=spread, graphs=graphs)

    def whole_run(*, graphs: bool) -> tuple[RungTime, ...]:
        return tuple(RungTime(planned=planned, step=step(planned.kept, graphs)) for planned in plan.rungs)

    rungs, dense = whole_run(graphs=config.layer_graphs), step(plan.whole, config.layer_graphs)
    replayed = sum(rung.seconds for rung in whole_run(graphs=True)) / sum(rung.seconds for rung in rungs)
    return Forecast(
        rungs=rungs,
        dense=dense,
        plan=plan,
        memory=memory_of(config, shape=shape, plan=plan),
        hardware=hardware,
        world_size=cluster.world_size,
        remarks=(
            *_remarks(config, steps=[dense, *(rung.step for rung in rungs)], replayed=replayed),
            *communication(spread),
        ),
    )


def step_of(
    config: Config, *, shape: ModelShape, kept: KeptShape, hardware: Hardware, spread: Spread, graphs: bool
) -> StepTime:
    """A step of the run in which each layer computes ``kept``. graphs: layers are replayed."""
    training = config.training
    return predict_step(
        shape,
        kept,
        hardware=hardware,
        batch=Batch(micro_batch_size=training.micro_batch_size, micro_batches=training.num_micro_batches),
        spread=spread,
        recompute=recompute_of(config),
        graphs=graphs,
        interval=config.selection.selection_interval,
        tied=not config.model.untie_embeddings_and_output_weights,
        beside=beside_of(config),
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
        graphs=config.layer_graphs,
        seen=[],
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
    if config.selection.omit != "both":
        raise ValueError(
            f"--sat-omit must be both for a prediction, got {config.selection.omit}: what such a step costs was never "
            "measured; predict without it"
        )
    if settings.get("baseline") == "est":
        raise ValueError(
            "--baseline must not be est for a prediction: layers that are left out differ from step to step and from "
            "stage to stage, what they save was never measured; predict another run"
        )
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
        overlaps_gathering=bool(config.ddp.get("overlap_param_gather")),
        sparse_reduction=config.sparse_reduce,
    )


def _remarks(config: Config, *, steps: Sequence[StepTime], replayed: float) -> list[str]:
    """replayed: the run's time with --layer-graphs, as a share of its own."""
    found, selection, others = [], config.selection, _unlike_what_was_measured(config)
    if replayed < 1 - WORTH_SAYING and not {"biases", "dropout"} & set(others):  # with which nothing is replayed
        waits = "layers or their choices wait for launches"
        found.append(f"{waits}: with --layer-graphs the run would take {replayed:.1%} of its time")
    sparse = config.schedule.kind != "none"
    if sparse and selection.importance != MEASURED_IMPORTANCE:
        every = selection.selection_interval
        kept = f", which chooses once in {every} steps here" if every > 1 else ""
        found.append(f"choosing was measured for {MEASURED_IMPORTANCE}, not for {selection.importance}{kept}")
    if sparse and config.weights != "compact":
        found.append("layers are predicted as packed once a step; --sat-weights gather is slower")
    if others:
        found.append(f"layers were measured as Llama has them: what {', '.join(others)} cost beside that is left out")
    distance = max(step.distance for step in steps)
    if distance > FAR:
        found.append(
            f"a shape is {distance:.1f} away from all that were measured (4 times in one size is {FAR:.1f}): a guess; "
            "measure it with benchmarks/bench_layer.py --models and --tokens"
        )
    return found


def _unlike_what_was_measured(config: Config) -> list[str]:
    """What a layer has that none of those had which were measured."""
    beside, transformer = beside_of(config), config.transformer
    has = {
        "biases": beside.linear_biases or beside.qkv_biases,
        "LayerNorm": beside.norm_biases,
        "positions that are not rotations": not beside.rotates,
        "dropout": bool(transformer.get("hidden_dropout") or transformer.get("attention_dropout")),
    }
    return [name for name, there in has.items() if there]


def communication(spread: Spread) -> list[str]:
    """Where the times come from that ranks take to talk, a sentence a way in which they do."""
    found = []
    if spread.tensor > 1:
        found.append(f"tensor parallelism communicates by {spread.tensor_link.source}")
    if spread.data > 1:
        found.append(f"replicas communicate by {spread.data_link.source}")
    if len(spread.layers) > 1:
        found.append("what pipeline ranks pass on is not counted")
    return found
