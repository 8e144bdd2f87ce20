"""What a run will do, said before its first step: what each rung really omits, operations, tokens, epochs.

A quota is a whole number of heads or channels, so the effective rate of a rung is not its nominal one, and on
many ranks several rungs may keep the same heads. The plan shows it while it can still be changed. Its bound
on the time saved is of operations alone: a run stays behind it, as far as a sparse step is less efficient.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeVar

from megatron_sat import log
from megatron_sat.counting import Counted
from megatron_sat.model.flops import KeptShape, ModelShape, Recompute, kept_shape, step_flops, whole
from megatron_sat.quotas import quota_warnings, quotas_of, text
from megatron_sat.sparsity.schedule import Rung, Schedule

MAX_ROWS = 12
"""Rows of the table. Linear and cosine schedules have a rung a step; their neighbours are shown together."""
_Any = TypeVar("_Any")
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


@dataclass(frozen=True, kw_only=True)
class PassedBy:
    """Layers that take no part in the first steps."""

    layers: int
    """How many, at least 1."""
    until: int
    """The last of these steps, at least 1."""


@dataclass(frozen=True, kw_only=True)
class PlannedRung:
    """A rung and what it comes to on this model with these quotas."""

    rung: Rung
    kept: KeptShape
    """What each layer computes, over all ranks."""
    heads_omitted: Fraction
    """Effective omission rate of the query heads, those of layers that are left out among them."""
    channels_omitted: Fraction
    """The same of the channels."""
    step_flops: int
    """Executed operations of a step's forward and backward, over all ranks."""
    choice_flops: int
    """Operations a step spends on choosing, on top."""

    @property
    def flops(self) -> int:
        """Executed operations of one step."""
        return self.step_flops + self.choice_flops


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole run in numbers."""

    rungs: tuple[PlannedRung, ...]
    whole: KeptShape
    """What a dense layer computes."""
    num_layers: int
    dense_step_flops: int
    """Operations of a dense step of the same run, recomputation included."""
    tokens_per_step: int
    epochs: Mapping[str, float]
    """By domain, how often the run goes through it."""
    quotas: tuple[str, str]
    """What the heads and the channels to keep are counted out of."""
    counted: Counted | None
    """What a baseline by masks costs by its source's count; None for another run."""
    warnings: tuple[str, ...]
    """What the quotas make of the schedule, where a reader may expect something else."""

    def at(self, step: int) -> PlannedRung:
        """The rung that ``step`` lies in."""
        return next(planned for planned in self.rungs if planned.rung.first <= step <= planned.rung.last)

    @property
    def steps(self) -> int:
        return self.rungs[-1].rung.last

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> int:
        """Executed operations of the run."""
        return sum(planned.rung.steps * planned.flops for planned in self.rungs)

    @property
    def dense_flops(self) -> int:
        """Operations of the same run without omission."""
        return self.steps * self.dense_step_flops

    @property
    def time_saving_bound(self) -> float:
        """The share of a dense run's time that this one saves at most: 1 - executed / dense operations."""
        return 1 - self.flops / self.dense_flops

    def mean_omitted(self) -> dict[str, float]:
        """Mean omission over the steps: "nominal", and effective for "heads" and "channels"."""
        sums = {"nominal": Fraction(0), "heads": Fraction(0), "channels": Fraction(0)}
        for planned in self.rungs:
            sums["nominal"] += planned.rung.steps * planned.rung.rate
            sums["heads"] += planned.rung.steps * planned.heads_omitted
            sums["channels"] += planned.rung.steps * planned.channels_omitted
        return {name: float(total / self.steps) for name, total in sums.items()}

    def columns(self) -> list[str]:
        """Heads of the table."""
        heads, channels = f"heads of {self.whole.heads}", f"channels of {self.whole.channels}"
        unit = f"{_PREFIXES[_thousands(self.dense_step_flops)]}FLOP"
        names = ["steps", "number", "rate", f"{heads} (omitted)", f"{channels} (omitted)"]
        return [*names, f"{unit}/step", "share"]

    def rows(self) -> list[list[object]]:
        """The table, at most `MAX_ROWS` rows of what `columns` names."""
        return [self._row(stretch) for stretch in stretches(self.rungs)]

    def _row(self, stretch: Sequence[PlannedRung]) -> list[object]:
        first, last = stretch[0], stretch[-1]
        steps = sum(planned.rung.steps for planned in stretch)
        mean = sum(planned.rung.steps * planned.flops for planned in stretch) / steps
        heads = span(first.kept.heads, last.kept.heads)
        channels = span(first.kept.channels, last.kept.channels)
        return [
            f"{first.rung.first}-{last.rung.last}",
            steps,
            span(first.rung.rate, last.rung.rate),
            f"{heads} ({span(first.heads_omitted, last.heads_omitted)})",
            f"{channels} ({span(first.channels_omitted, last.channels_omitted)})",
            f"{mean / 1000 ** _thousands(self.dense_step_flops):.4g}",
            f"{mean / self.dense_step_flops:.3f}",
        ]

    def lines(self) -> list[str]:
        """What stands under the table, a sentence a line; warnings last."""
        passes = ", ".join(f"{name} {epochs:.2f}" for name, epochs in self.epochs.items())
        amount = f"{self.steps:,} steps of {self.tokens_per_step:,} tokens: {self.tokens:,} tokens"
        lines = [f"{amount}; epochs: {passes}" if passes else amount]
        if self.flops == self.dense_flops:
            lines.append(f"dense: {_operations(self.flops)}, no neuron is ever omitted")
        else:
            lines += self._saving()
        lines += [] if self.counted is None else self.counted.lines()
        return lines + [f"warning: {warning}" for warning in self.warnings]

    def _saving(self) -> list[str]:
        mean = self.mean_omitted()
        omission = "mean omission {nominal:.3f}; effective {heads:.3f} of heads, {channels:.3f} of channels"
        choosing = sum(planned.rung.steps * planned.choice_flops for planned in self.rungs) / self.flops
        part = f"{choosing:.2%}" if choosing >= 1e-4 or choosing == 0 else "less than 0.01%"
        executed, dense = _operations(self.flops), _operations(self.dense_flops)
        share = f"{self.flops / self.dense_flops:.3f}"
        whole = max(planned.kept.whole_layers for planned in self.rungs)
        ends = [f"{whole // 2} layers at each end omit nothing; the table is of those between them"] if whole else []
        ends += self._without_layers()
        bound, speed = f"{self.time_saving_bound:.1%}", f"{self.dense_flops / self.flops:.2f}x"
        return [
            *ends,
            omission.format(**mean),
            f"executed {executed} of {dense} dense: {share}; choosing neurons is {part} of it",
            f"time saved over a dense run: at most {bound} ({speed}), if a sparse step is as efficient",
        ]

    def _without_layers(self) -> list[str]:
        some = [planned for planned in self.rungs if planned.kept.layers_left_out]
        if not some:
            return []
        layers = f"{some[0].kept.layers_left_out} of {self.num_layers} layers, others in each"
        steps = f"{some[0].rung.first}-{some[-1].rung.last}"
        return [f"steps {steps} leave out {layers}; heads and channels are of the rest"]

    def as_dict(self) -> dict[str, Any]:
        """The plan for machines: plain numbers and strings, for JSON; ``rate_exact`` is a fraction."""
        return {
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "tokens": self.tokens,
            "epochs": dict(self.epochs),
            "quotas": list(self.quotas),
            "executed_flops": self.flops,
            "dense_flops": self.dense_flops,
            "dense_step_flops": self.dense_step_flops,
            "time_saving_bound": self.time_saving_bound,
            "mean_omitted": self.mean_omitted(),
            "rungs": [_rung_as_dict(planned, dense=self.dense_step_flops) for planned in self.rungs],
            "warnings": list(self.warnings),
        } | ({} if self.counted is None else {"counted": self.counted.as_dict()})


def build_plan(
    schedule: Schedule,
    *,
    shape: ModelShape,
    selection_groups: int,
    channel_multiple: int,
    gqa: str,
    modules: str = "all",
    whole_layers: int = 0,
    omit: str = "both",
    passed_by: PassedBy | None = None,
    tokens_per_step: int,
    recompute: Recompute,
    choice_flops: int,
    epochs: Mapping[str, float],
    counted: Counted | None = None,
) -> Plan:
    """The plan of a run of ``schedule`` on a model of ``shape``.

    choice_flops: operations that choosing costs a step (`flops.choice_flops` over the interval); one that
    keeps everything spends none. epochs: by domain, passes over it in the whole run. recompute: it counts in
    the dense run too. counted: of a baseline by masks. passed_by: layers that take no part. Raises ValueError where
    the selection groups do not fit the model.
    """
    dense, number = whole(shape), shape.num_layers

    def planned(rung: Rung, left_out: int) -> PlannedRung:
        kept = kept_shape(
            shape,
            rung.rate,
            selection_groups=selection_groups,
            channel_multiple=channel_multiple,
            gqa=gqa,
            modules=modules,
            whole_layers=whole_layers,
            omit=omit,
        )
        kept = replace(kept, layers_left_out=left_out)
        sparse = 1 - Fraction(kept.whole_layers + left_out, number)
        return PlannedRung(
            rung=rung,
            kept=kept,
            heads_omitted=Fraction(left_out, number) + sparse * (1 - Fraction(kept.heads, dense.heads)),
            channels_omitted=Fraction(left_out, number) + sparse * (1 - Fraction(kept.channels, dense.channels)),
            step_flops=step_flops(shape, kept, tokens=tokens_per_step, recompute=recompute),
            choice_flops=0 if kept == dense else choice_flops,
        )

    rungs = tuple(planned(rung, left_out) for rung, left_out in _by_layers(schedule.rungs(), passed_by=passed_by))
    quotas = quotas_of(shape, selection_groups=selection_groups, channel_multiple=channel_multiple, gqa=gqa)
    return Plan(
        rungs=rungs,
        whole=dense,
        num_layers=number,
        dense_step_flops=step_flops(shape, dense, tokens=tokens_per_step, recompute=recompute),
        tokens_per_step=tokens_per_step,
        epochs=epochs,
        quotas=(quotas[0].size, quotas[1].size),
        counted=counted,
        warnings=tuple(
            warning
            for quota, other in zip(quotas, ("mlp", "attention"), strict=True)
            if modules != other
            for warning in quota_warnings(quota, _rates(rungs), many=MAX_ROWS)
        ),
    )


def _by_layers(rungs: Sequence[Rung], *, passed_by: PassedBy | None) -> Iterator[tuple[Rung, int]]:
    """The rungs, cut where layers come back, and how many layers each leaves out."""
    last = 0 if passed_by is None else passed_by.until
    for rung in rungs:
        if rung.first <= last and passed_by is not None:
            yield replace(rung, last=min(rung.last, last)), passed_by.layers
        if rung.last > last:
            yield replace(rung, first=max(rung.first, last + 1)), 0


def _rates(rungs: Sequence[PlannedRung]) -> list[tuple[Fraction, KeptShape]]:
    """Each rate once that follows another, and what it keeps."""
    following = zip([None, *rungs], rungs, strict=False)
    return [(r.rung.rate, r.kept) for before, r in following if before is None or before.rung.rate != r.rung.rate]


def show(plan: Plan) -> None:
    """The plan on the console, from rank 0."""
    log.table(f"plan (quotas: {', '.join(plan.quotas)})", plan.columns(), plan.rows())
    for line in plan.lines():
        log.say(line)


def stretches(rungs: Sequence[_Any]) -> list[Sequence[_Any]]:
    """Rungs (or whatever there is one of for each) by rows: one a row.

    Of too many, the first alone (it may be most of the run), the others in equal parts.
    """
    if len(rungs) <= MAX_ROWS:
        return [[planned] for planned in rungs]
    size = math.ceil((len(rungs) - 1) / (MAX_ROWS - 1))
    return [rungs[:1], *(rungs[at : at + size] for at in range(1, len(rungs), size))]


def _rung_as_dict(planned: PlannedRung, *, dense: int) -> dict[str, Any]:
    return {
        "first": planned.rung.first,
        "last": planned.rung.last,
        "steps": planned.rung.steps,
        "rate": float(planned.rung.rate),
        "rate_exact": str(planned.rung.rate),
        "heads_kept": planned.kept.heads,
        "heads_omitted": float(planned.heads_omitted),
        "query_groups_kept": planned.kept.groups,
        "channels_kept": planned.kept.channels,
        "channels_omitted": float(planned.channels_omitted),
        "layers_left_out": planned.kept.layers_left_out,
        "step_flops": planned.step_flops,
        "choice_flops": planned.choice_flops,
        "share_of_dense": planned.flops / dense,
    }


def span(first: Fraction | int, last: Fraction | int) -> str:
    """Both ends of a row's values, or the one value that it has."""
    return text(first) if first == last else f"{text(first)} to {text(last)}"


def _thousands(count: float) -> int:
    """The place in _PREFIXES that suits ``count``."""
    return min(int(math.log10(max(count, 1)) // 3), len(_PREFIXES) - 1)


def _operations(count: float) -> str:
    """1.234e15 as "1.234 PFLOP"."""
    place = _thousands(count)
    return f"{count / 1000**place:.4g} {_PREFIXES[place]}FLOP"
