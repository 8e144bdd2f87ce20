"""What a comparison says: rows of a table, and sentences. `page` makes a page of them.

Every candidate stands beside two dense runs from the same start: the reference, which did as many steps, and
its own control, which had as much training time. The control decides whether the time was well spent, so it
is never left out. Sentences say who is ahead, whoever it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_sat.compare.runs import Run

LEVEL = 0.0005
"""Losses closer than this, in nats a token, print alike and are called level."""
TIME_TOLERANCE = 0.05
"""A control whose time is off by more than this share is no longer called the same time."""


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """A candidate and its control."""

    candidate: Run
    control: Run
    """The reference's method for as many steps as fit into the candidate's training time."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs from one start on one machine."""

    reference: Run
    """The dense run over all steps."""
    challenges: tuple[Challenge, ...]
    """At least one."""
    domains: tuple[str, ...]
    """Validation sets, the one that the runs learn first; at least one, in every run."""
    start: Run | None = None
    """What all the others continue; None where no run of ours made it, or its losses are of another tokenizer."""
    tokens_per_character: Mapping[str, float] = field(default_factory=dict)
    """By domain; where given, losses are also said in bits a character, whatever the tokenizer."""

    def __post_init__(self) -> None:
        if not self.challenges:
            raise ValueError("a comparison must have a challenge, got none; add a candidate and its control")
        if not self.domains:
            raise ValueError("a comparison must have a domain, got none; name a validation set")
        for run in (*([] if self.start is None else [self.start]), *self.runs):
            if missing := set(self.domains) - set(run.final_loss):
                raise ValueError(
                    f"the run {run.name!r} must be validated on {', '.join(sorted(missing))}, it has "
                    f"{', '.join(run.final_loss)}; give every run the same validation sets"
                )

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs that continue the start, in the order of tables and pictures."""
        pairs = [run for challenge in self.challenges for run in (challenge.candidate, challenge.control)]
        return (self.reference, *pairs)


def columns(comparison: Comparison) -> list[str]:
    """Heads of the table."""
    losses = [f"{domain} loss" for domain in comparison.domains]
    bits = [f"{domain} bits/char" for domain in _domains_in_bits(comparison)]
    return ["run", *losses, *bits, "steps", "training s", "tokens/s", "executed FLOPs"]


def rows(comparison: Comparison) -> list[list[str]]:
    """The table's cells: the start's losses, if it has any, then every run."""
    found = [_row(run, comparison) for run in comparison.runs]
    if comparison.start is None:
        return found
    start = _loss_cells(comparison.start, comparison)
    empty = [""] * (len(columns(comparison)) - 1 - len(start))
    return [[comparison.start.name, *start, *empty], *found]


def _row(run: Run, comparison: Comparison) -> list[str]:
    return [
        run.name,
        *_loss_cells(run, comparison),
        f"{run.steps:,}",
        f"{run.seconds:.1f}",
        f"{run.tokens_per_second:,.0f}",
        f"{run.executed_flops:.3g}",
    ]


def _loss_cells(run: Run, comparison: Comparison) -> list[str]:
    losses = [f"{run.final_loss[domain]:.4f}" for domain in comparison.domains]
    rates = {domain: comparison.tokens_per_character[domain] for domain in _domains_in_bits(comparison)}
    bits = [
        f"{bits_per_character(run.final_loss[domain], tokens_per_character=rate):.3f}" for domain, rate in rates.items()
    ]
    return losses + bits


def _domains_in_bits(comparison: Comparison) -> list[str]:
    return [domain for domain in comparison.domains if domain in comparison.tokens_per_character]


def bits_per_character(loss: float, *, tokens_per_character: float) -> float:
    """A loss in nats a token, as bits a character of the text that the tokens are."""
    return loss * tokens_per_character / math.log(2)


def verdicts(comparison: Comparison) -> list[str]:
    """What the numbers say of every candidate: its cost, then how it stands beside both dense runs."""
    said = []
    for challenge in comparison.challenges:
        said += [
            _cost(challenge.candidate, reference=comparison.reference),
            _same_steps(challenge.candidate, comparison=comparison),
            _same_time(challenge, domains=comparison.domains),
        ]
    return said


def _cost(candidate: Run, *, reference: Run) -> str:
    time = candidate.seconds / reference.seconds * reference.steps / candidate.steps
    flops = candidate.executed_flops / reference.executed_flops * reference.steps / candidate.steps
    return cost_said(candidate.name, reference=reference.name, time=time, flops=flops)


def cost_said(candidate: str, *, reference: str, time: float, flops: float) -> str:
    """What a step costs, beside one of another run. time, flops: of that one's."""
    less, fewer = _change(time, "less", "more"), _change(flops, "fewer", "more")
    return (
        f"A step of {candidate} took {less} time than one of {reference} and executed {fewer} "
        f"operations (means over each run): {1 / time:.2f} times as fast, where {1 / flops:.2f} times would "
        "be proportional to the operations."
    )


def _change(ratio: float, down: str, up: str) -> str:
    return f"{abs(1 - ratio):.1%} {down if ratio <= 1 else up}"


def _same_steps(candidate: Run, *, comparison: Comparison) -> str:
    reference = comparison.reference
    steps = " and ".join(f"{count:,}" for count in dict.fromkeys((candidate.steps, reference.steps)))
    return f"After {steps} steps: " + _standings(candidate, reference, domains=comparison.domains)


def _same_time(challenge: Challenge, *, domains: Sequence[str]) -> str:
    candidate, control = challenge.candidate, challenge.control
    return (
        f"{time_said(challenge)}, {candidate.seconds:.1f} s of {candidate.name} for {candidate.steps:,} steps and "
        f"{control.seconds:.1f} s of {control.name} for {control.steps:,}: "
        + _standings(candidate, control, domains=domains)
    )


def time_said(challenge: Challenge) -> str:
    """Whether the control had the candidate's time, as a sentence begins."""
    return time_beside(challenge.candidate.seconds, control=challenge.control.seconds)


def time_beside(candidate: float, *, control: float) -> str:
    """Whether a control had a candidate's time, both in seconds, as a sentence begins."""
    if is_equal_time(candidate, control=control):
        return "At equal training time"
    return (
        f"At unequal training time (the control took {_change(control / candidate, 'less', 'more')}: the machine "
        "changed its pace, run again when it is quiet)"
    )


def is_equal_time(candidate: float, *, control: float) -> bool:
    """Whether two times, both in seconds, are called the same."""
    return abs(control / candidate - 1) <= TIME_TOLERANCE


def _standings(candidate: Run, other: Run, *, domains: Sequence[str]) -> str:
    said = [_standing(candidate, other, domain=domain) for domain in domains]
    return "; ".join(said) + "."


def _standing(candidate: Run, other: Run, *, domain: str) -> str:
    def order(run: Run) -> float:
        loss = run.final_loss[domain]
        return loss if math.isfinite(loss) else math.inf  # a run that diverged is behind

    ahead, behind = sorted((candidate, other), key=order)
    lower, higher = ahead.final_loss[domain], behind.final_loss[domain]
    values = f"{lower:.4f} against {higher:.4f}"
    if not math.isfinite(lower):
        return f"on {domain} both diverged ({values})"
    if not math.isfinite(higher):
        return f"on {domain} {ahead.name} is ahead of {behind.name}, which diverged ({values})"
    if higher - lower < LEVEL:
        return f"on {domain} they are level ({lower:.4f})"
    return f"on {domain} {ahead.name} is ahead of {behind.name} by {higher - lower:.3f} ({values})"


NOTES = (
    "Losses are those of the dense model on held-out text, in nats a token; lower is better.",
    "Seconds are training alone, by each run's own record, without evaluations, checkpoints and start-up.",
    "Executed operations are those of the neurons that took part, forward and backward, and of choosing them.",
    "One seed a run: the table has no error bars, and small differences may be chance.",
)
