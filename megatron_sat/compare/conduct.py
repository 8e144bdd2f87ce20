"""An experiment made: every stage that is not done, in an order in which the machine's moods hit all variants alike.

Seed by seed dense and all variants; then what is learnt from their times, the dense runs that fill them. As long as
their time is compared, training runs are alone on the machine, or each on a GPU of its own beside others of its kind.
"""

import contextlib
import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_sat import cli
from megatron_sat.compare.devices import places
from megatron_sat.compare.experiment import CONTROLS, DENSE, EQUAL_TIME, PROGRAMS, RATE_ZERO, method_alone, sparse
from megatron_sat.compare.lab import Lab, Planned, at_rate_zero
from megatron_sat.compare.measured import read_measured
from megatron_sat.compare.runs import Run, read_run, steps_that_fit
from megatron_sat.compare.settled import settled
from megatron_sat.compare.stages import Place, Runner, Stage
from megatron_sat.compare.study import Group, Study, Trial, dense_of_steps, group_of_rate_zero
from megatron_sat.log import say

_SHARED = "; beside other runs"


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """How an experiment is made."""

    lab: Lab
    runner: Runner
    without: tuple[str, ...] = ()
    """Controls to leave out, of CONTROLS."""
    gpus: tuple[str, ...] = ()
    """What CUDA_VISIBLE_DEVICES calls the GPUs that training runs are spread over, all of one kind.

    Empty: one run at a time, which sees all that this process sees.
    """
    turns: int = 1
    """Runs that are begun at once where one is to train at a time: the others start up, or end, meanwhile."""

    def __post_init__(self) -> None:
        for name in self.without:
            if name not in CONTROLS:
                raise ValueError(f"--without-control must be one of {', '.join(CONTROLS)}, got {name}; choose one")
        needing = [name for name in (EQUAL_TIME, RATE_ZERO) if name not in self.without]
        if DENSE in self.without and self.lab.experiment.dense_steps:
            raise ValueError(
                f"--without-control {DENSE} leaves out what budget: dense_steps asks for; remove one of the two"
            )
        if DENSE in self.without and needing:
            raise ValueError(
                f"--without-control {DENSE} takes from {' and '.join(needing)} what they are measured by; add "
                + " ".join(f"--without-control {name}" for name in needing)
            )

    @property
    def shared(self) -> bool:
        """Whether more training runs are made at once than there are GPUs: only where no time is compared."""
        return self.turns == 1 and EQUAL_TIME in self.without and self.runner.jobs > max(1, len(self.gpus))

    @property
    def places(self) -> list[Place]:
        """Where training runs are made, at once."""
        at_once = self.runner.jobs if self.shared else max(1, len(self.gpus))
        return places(self.gpus, at_once=at_once, turns=self.turns, turn=self.lab.out / "turns")

    def prepare(self) -> None:
        """What comes before any training."""
        imported = self.lab.imported
        self.runner.run_all([*([] if imported is None else [imported]), *self.lab.texts])

    def check(self) -> dict[str, tuple[int, int]]:
        """Read the command line of every run as the program will, of one seed, and a start's.

        Returns, by group, how many sequences of a domain are evaluated at most, and the tokens of one. Needs what
        `prepare` makes. Raises ValueError for what the program would refuse.
        """
        evaluated = {}
        experiment, root = self.lab.experiment, self.lab.shop.root
        program, runs = experiment.program, {name: self.lab.run(planned[0]) for name, planned in self._first().items()}
        for name, stage in {**runs, "start": self.lab.start(experiment.seeds[0])}.items():
            arguments = list(stage.command[stage.command.index(program) + 1 :])
            sft = ["--sft"] if program == PROGRAMS[1] else []
            ranks, cuda = experiment.ranks, torch.cuda.is_available()
            with contextlib.chdir(root):
                try:
                    config = cli.parse([*sft, *arguments], world_size=ranks, cuda=cuda, speaks=False)
                except cli.ParsedExit as refused:
                    said = refused.said.removeprefix("error: ").strip()
                    raise ValueError(f"{name} must be a run that {program} can make: {said}") from refused
            if name in runs:
                sequences = config.training.eval_iters * config.training.global_batch_size
                evaluated[name] = sequences, config.settings["seq_length"]
        return evaluated

    def study(self) -> Study:
        """Run every stage that is not done, and read what came of it. Raises what `Runner.run` raises."""
        experiment = self.lab.experiment
        self.prepare()
        evaluated = self.check()
        starts = [self.lab.start(seed) for seed in experiment.seeds]
        self._train(starts)
        first = self._stages(self._first())
        self._train([stage for seed in experiment.seeds for stages in first.values() for stage in _of(stages, seed)])
        groups = {name: self._group(name, stages) for name, stages in first.items()}
        shares, further = self._equal_time(groups)
        more = self._stages(further)
        self._train([stage for stages in more.values() for stage in stages.values()])
        groups |= {name: self._group(name, stages) for name, stages in more.items()}
        rates = {variant: group_of_rate_zero(variant) for variant in self._zeroed}
        stages = {**first, **more}
        return Study(
            experiment=experiment,
            groups=groups,
            starts={
                seed: read_run(stage.folder, name="start").final_loss
                for seed, stage in zip(experiment.seeds, starts, strict=True)
            },
            tokens_per_character=self._tokens_per_character(),
            equal_time=shares,
            rate_zero=rates,
            differences={variant: self._differences(stages[DENSE], stages[name]) for variant, name in rates.items()},
            passes={name: _passes(each) for name, each in stages.items()},
            evaluated=evaluated,
            left_out=self.without,
            shared=self.shared,
            turns=self.turns,
        )

    def rehearse(self) -> None:
        """Say every command, in order, and run none."""
        experiment = self.lab.experiment
        imported = self.lab.imported
        planned = [stage for stages in self._stages(self._first()).values() for stage in stages.values()]
        every = [*([] if imported is None else [imported]), *self.lab.texts]
        every += [*(self.lab.start(seed) for seed in experiment.seeds), *planned]
        for stage in every:
            say(f"{stage.name}: {shlex.join(stage.command)}")
        if EQUAL_TIME not in self.without:
            say(
                f"then, for each of {', '.join(experiment.variants)}, dense with the steps that fit into its measured "
                f"time, {len(experiment.seeds)} seeds each; variants with equally many share one"
            )
        if self.gpus:
            say(f"training runs: {self.places[0].at_once} at once, on the GPUs {', '.join(self.gpus)}")
        say(f"{len(every)} stages in {self.lab.shop.named(self.lab.out)}, without those")

    # -- which runs there are

    @property
    def _zeroed(self) -> list[str]:
        """Variants with a control at rate 0: those that omit something."""
        variants = self.lab.experiment.variants.items()
        return [] if RATE_ZERO in self.without else [name for name, settings in variants if sparse(settings)]

    def _first(self) -> dict[str, list[Planned]]:
        """All runs whose steps are known beforehand, by group."""
        experiment = self.lab.experiment
        seeds, variants = experiment.seeds, experiment.variants
        found = {}
        if DENSE not in self.without:
            found[DENSE] = self._planned(DENSE, {}, seeds=seeds)
            for steps in experiment.dense_steps:
                found[dense_of_steps(steps)] = self._planned(dense_of_steps(steps), {}, seeds=seeds, steps=steps)
        found |= {name: self._planned(name, settings, seeds=seeds) for name, settings in variants.items()}
        for name in self._zeroed:  # what must be the dense run is proven by one seed
            some = seeds[:1] if method_alone(variants[name]) else seeds
            zero = group_of_rate_zero(name)
            found[zero] = self._planned(zero, at_rate_zero(variants[name]), seeds=some)
        return found

    def _planned(
        self, group: str, settings: Mapping[str, object], *, seeds: Sequence[int], steps: int | None = None
    ) -> list[Planned]:
        count = steps or self.lab.experiment.steps
        return [Planned(group=group, seed=seed, steps=count, settings=settings) for seed in seeds]

    def _equal_time(self, groups: Mapping[str, Group]) -> tuple[dict[str, str], dict[str, list[Planned]]]:
        """Variant to the group that fills its time, and the groups that this needs besides."""
        shares: dict[str, str] = {}
        further: dict[str, list[Planned]] = {}
        if EQUAL_TIME in self.without:
            return shares, further
        experiment = self.lab.experiment
        dense = [trial.run for trial in groups[DENSE].trials.values()]
        for variant in experiment.variants:
            steps = equal_time_steps(dense, [trial.run for trial in groups[variant].trials.values()])
            shares[variant] = DENSE if steps == experiment.steps else dense_of_steps(steps)
            if shares[variant] not in groups:
                further[shares[variant]] = self._planned(shares[variant], {}, seeds=experiment.seeds, steps=steps)
        return shares, further

    # -- runs

    def _stages(self, planned: Mapping[str, Sequence[Planned]]) -> dict[str, dict[int, Stage]]:
        return {name: {each.seed: self._marked(self.lab.run(each)) for each in runs} for name, runs in planned.items()}

    def _marked(self, stage: Stage) -> Stage:
        """Runs beside others are made again before their time is compared."""
        return replace(stage, made_with=stage.made_with + _SHARED) if self.shared else stage

    def _train(self, stages: Sequence[Stage]) -> None:
        self.runner.run_in(stages, places=self.places)

    def _group(self, name: str, stages: Mapping[int, Stage]) -> Group:
        short = self.lab.experiment.time == "settled"
        trials = {seed: _trial(stage, name=name, short=short) for seed, stage in stages.items()}
        return Group(name=name, trials=trials)

    def _differences(self, dense: Mapping[int, Stage], zero: Mapping[int, Stage]) -> dict[int, str | None]:
        checks = {seed: self.lab.same(dense[seed], stage) for seed, stage in zero.items()}
        self.runner.run_all(list(checks.values()))
        return {seed: _content(stage.folder / "same.json")["difference"] for seed, stage in checks.items()}

    def _tokens_per_character(self) -> dict[str, float]:
        """Of what is held out, by domain, where there is such a figure."""
        found = {domain: self.lab.tokens_per_character(domain) for domain in self.lab.experiment.valid}
        return {domain: rate for domain, rate in found.items() if rate is not None}


def equal_time_steps(dense: Sequence[Run], variant: Sequence[Run]) -> int:
    """Dense steps that fit into a variant's time: its seeds' mean time, at the pace of each dense run, averaged."""
    seconds = statistics.fmean(run.seconds for run in variant)
    return int(statistics.fmean(steps_that_fit(run, seconds=seconds) for run in dense))


def _of(stages: Mapping[int, Stage], seed: int) -> list[Stage]:
    return [stages[seed]] if seed in stages else []


def _trial(stage: Stage, *, name: str, short: bool) -> Trial:
    measured, run = read_measured(stage.folder), read_run(stage.folder, name=name)
    return Trial(
        run=settled(run) if short else run,
        peak_memory_bytes=measured.peak_memory_bytes,
        commits=measured.commits,
        at_once=stage.at_once,
    )


def _passes(stages: Mapping[int, Stage]) -> float:
    """How often the domain was read that was read most often, by the plan of the group's first run."""
    plan = _content(next(iter(stages.values())).folder / "plan.json")
    return max(plan["epochs"].values())


def _content(path: Path) -> dict:  # type: ignore[type-arg]
    return json.loads(path.read_text())
