"""What came of an experiment: groups of runs that differ in their seed alone, what each measured, who is whose control.

A figure is a number of one run; a group has one for each seed. Figures' names are those of requirements and history:
zh_loss, zh_poetry_bpc, forgetting_bpc, seconds, ... (`figures`).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from megatron_sat.compare.experiment import DENSE, EQUAL_TIME, PROGRAMS, RATE_ZERO, Experiment, sparse
from megatron_sat.compare.report import bits_per_character, is_equal_time
from megatron_sat.compare.runs import Run

NEVER = math.inf
"""The time of what was not reached."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run."""

    run: Run
    peak_memory_bytes: int
    commits: tuple[str, ...]
    """Of the project, when it ran."""
    at_once: tuple[int, ...] = (1,)
    """How many runs were made at once when it was, itself counted; several numbers where it was interrupted."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one setting, a seed each."""

    name: str
    trials: Mapping[int, Trial]
    """By seed; at least one."""

    @property
    def steps(self) -> int:
        """Of every run."""
        return next(iter(self.trials.values())).run.steps


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over seeds."""

    values: Mapping[int, float]
    """By seed; at least one."""

    @property
    def mean(self) -> float:
        """NaN counts: what diverged once has no mean."""
        return math.fsum(self.values.values()) / len(self.values)

    @property
    def std(self) -> float:
        """Of the sample; NaN where there is one value alone, or one that is not finite."""
        finite = all(math.isfinite(value) for value in self.values.values())
        return statistics.stdev(self.values.values()) if finite and len(self.values) > 1 else math.nan

    @property
    def min(self) -> float:
        return min(self.values.values())

    @property
    def max(self) -> float:
        return max(self.values.values())


@dataclass(frozen=True, kw_only=True)
class Study:
    """All of an experiment, measured."""

    experiment: Experiment
    groups: Mapping[str, Group]
    """Dense, then each variant, then the other controls."""
    starts: Mapping[int, Mapping[str, float]]
    """By seed, the loss of the model before any training, by domain."""
    tokens_per_character: Mapping[str, float]
    """By domain of validation; without those whose text nobody counted."""
    equal_time: Mapping[str, str] = field(default_factory=dict)
    """Variant to the group that had its time."""
    rate_zero: Mapping[str, str] = field(default_factory=dict)
    """Variant to the group of it that omitted nothing."""
    differences: Mapping[str, Mapping[int, str | None]] = field(default_factory=dict)
    """Variant to what its run at rate 0 has otherwise than the dense one, by seed; None: nothing, bit for bit."""
    passes: Mapping[str, float] = field(default_factory=dict)
    """Group to how often it read the domain that it read most often."""
    evaluated: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Group to how many sequences of each domain judge it at most, and the tokens of one."""
    left_out: tuple[str, ...] = ()
    """Controls that were not run, on request."""
    shared: bool = False
    """Whether runs shared the machine, so that their times say nothing."""
    turns: int = 1
    """How many runs were begun where one trained at a time."""

    @cached_property
    def figures(self) -> dict[str, dict[str, Spread]]:
        """By group, then by name."""
        return {name: self._of(group) for name, group in self.groups.items()}

    @property
    def names(self) -> dict[str, str]:
        """Every name of a group, other names of controls among them, to the group's own."""
        others = {f"{EQUAL_TIME}_{variant}": group for variant, group in self.equal_time.items()}
        return {**{name: name for name in self.groups}, **others}

    @property
    def commits(self) -> tuple[str, ...]:
        """Of all runs."""
        trials = [trial for group in self.groups.values() for trial in group.trials.values()]
        return tuple(dict.fromkeys(commit for trial in trials for commit in trial.commits))

    @property
    def at_once(self) -> tuple[int, ...]:
        """How many runs were made at once, of all runs: (1,) where each was alone, (4,) with four GPUs."""
        trials = (trial for group in self.groups.values() for trial in group.trials.values())
        return tuple(sorted({number for trial in trials for number in trial.at_once}))

    def off_time(self, variant: str) -> bool:
        """Whether a variant's equal-time control turned out to have had another time."""
        mine, theirs = (self.figures[name]["seconds"].mean for name in (variant, self.equal_time[variant]))
        return not is_equal_time(mine, control=theirs)

    def _of(self, group: Group) -> dict[str, Spread]:
        found: dict[str, dict[int, float]] = {}
        for seed, trial in group.trials.items():
            for name, value in self._of_trial(seed, trial).items():
                found.setdefault(name, {})[seed] = value
        return {name: Spread(values=values) for name, values in found.items()}

    def _of_trial(self, seed: int, trial: Trial) -> dict[str, float]:
        run, old = trial.run, self.experiment.old
        found = self.quality(run.final_loss)
        before = self.quality(self.starts[seed])
        if old is not None:
            figures = {kind: f"{figure_of(old)}_{kind}" for kind in ("loss", "bpc")}
            found |= {
                f"forgetting_{kind}": found[name] - before[name] for kind, name in figures.items() if name in found
            }
        found |= {
            "steps": run.steps,
            "seconds": run.seconds,
            "step_seconds": run.step_seconds,
            "tokens_per_second": run.tokens_per_second,
            "flops": run.executed_flops,
            "peak_memory_gib": trial.peak_memory_bytes / 2**30,
        }
        if DENSE in self.groups and seed in self.groups[DENSE].trials:
            dense = self.groups[DENSE].trials[seed].run
            goal = _mean(dense.final_loss, self.experiment.target)
            found["seconds_to_dense"] = seconds_to(run, goal=goal, domains=self.experiment.target)
        return found

    def quality(self, loss: Mapping[str, float]) -> dict[str, float]:
        """Loss, and bits a character where the text was counted, by domain and by language."""
        found: dict[str, float] = {}
        bits = {
            domain: bits_per_character(loss[domain], tokens_per_character=rate)
            for domain, rate in self.tokens_per_character.items()
        }
        for kind, values in (("loss", loss), ("bpc", bits)):
            for language, domains in self.experiment.languages.items():
                known = [domain for domain in domains if domain in values]
                found |= {f"{figure_of(domain)}_{kind}": values[domain] for domain in known}
                if known == domains:
                    found[f"{figure_of(language)}_{kind}"] = _mean(values, domains)
        return found


MEASURES = ("steps", "seconds", "step_seconds", "tokens_per_second", "flops", "peak_memory_gib")
"""Figures of every run."""


def figure_names(experiment: Experiment, *, left_out: Sequence[str] = ()) -> list[str]:
    """The figures that a study of it will have, as far as its text will be counted."""
    kinds = ("loss", "bpc") if experiment.program == PROGRAMS[0] else ("loss",)
    places = dict.fromkeys(figure_of(name) for name in (*experiment.languages, *experiment.valid))
    found = [f"{place}_{kind}" for kind in kinds for place in places]
    found += [f"forgetting_{kind}" for kind in kinds if experiment.old is not None]
    return [*found, *MEASURES, *(() if DENSE in left_out else ("seconds_to_dense",))]


def group_names(experiment: Experiment, *, left_out: Sequence[str] = ()) -> list[str]:
    """The names of groups that a study of it will have, but for those whose number of steps time decides."""
    variants = experiment.variants
    omitting = [name for name, settings in variants.items() if sparse(settings)]
    return [
        *(() if DENSE in left_out else (DENSE, *(dense_of_steps(steps) for steps in experiment.dense_steps))),
        *variants,
        *(() if RATE_ZERO in left_out else (group_of_rate_zero(name) for name in omitting)),
        *(() if EQUAL_TIME in left_out else (f"{EQUAL_TIME}_{name}" for name in variants)),
    ]


def dense_of_steps(steps: int) -> str:
    """The group of dense runs with another number of steps than all runs have."""
    return f"{DENSE}_{steps}_steps"


def figure_of(domain: str) -> str:
    """A domain as names of figures have it."""
    return domain.replace(".", "_").replace("-", "_")


def language_figures(study: Study) -> list[str]:
    """Of each language bits a character where its text was counted, else the loss."""
    known = next(iter(study.figures.values()))
    places = [figure_of(language) for language in study.experiment.languages]
    return [f"{place}_bpc" if f"{place}_bpc" in known else f"{place}_loss" for place in places]


def seconds_to(run: Run, *, goal: float, domains: Sequence[str]) -> float:
    """Training time until the mean loss of ``domains`` is ``goal``, straight between evaluations; `NEVER` if it is not.

    What is reached by the first evaluation counts as reached with it.
    """
    points = [(point.elapsed_seconds, _mean(point.loss, domains)) for point in run.validations]
    for number, (seconds, loss) in enumerate(points):
        if loss <= goal:
            if number == 0:
                return seconds
            earlier, higher = points[number - 1]
            share = (higher - goal) / (higher - loss) if math.isfinite(higher) else 1.0
            return earlier + share * (seconds - earlier)
    return NEVER


def flops_at(run: Run, step: int) -> float:
    """Operations executed until a step, straight between records."""
    steps, flops = zip((0, 0.0), *((window.step, window.executed_flops) for window in run.windows), strict=True)
    return float(np.interp(step, steps, flops))


def paired(one: Spread, other: Spread) -> Spread:
    """Differences of what both have, seed by seed. Raises ValueError where they have no seed in common."""
    seeds = [seed for seed in one.values if seed in other.values]
    if not seeds:
        raise ValueError(
            f"two groups must have a seed in common to be compared, they have {list(one.values)} and "
            f"{list(other.values)}; run both with the same seeds"
        )
    return Spread(values={seed: one.values[seed] - other.values[seed] for seed in seeds})


def group_of_rate_zero(variant: str) -> str:
    """The name of a variant's control at rate 0."""
    return f"{variant}_{RATE_ZERO}"


def _mean(values: Mapping[str, float], domains: Sequence[str]) -> float:
    return math.fsum(values[domain] for domain in domains) / len(domains)
