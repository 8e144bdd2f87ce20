"""The omission rate as a pure function of the step: the ladder (eq. 11), constant, linear, cosine, MST's phases, none.

Steps count from 1 for the first optimizer update to T for the last. Rates are exact fractions: in floats
``r - r / L * l`` gives 0.6000000000000001 where 0.6 is meant, and a rung that keeps 3 of 10 heads instead
of 4. Steps of one rate lie together: a rung; only MST's rate ever rises. A step outside 1..T is an error, for
whoever asks about one has lost count; look one step ahead with `Schedule.last_step`, and evaluate outside a
step, where all is dense.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import partial

Rate = str | int | float | Decimal | Fraction

COSINE_GRID = 10**6
"""A cosine is rounded to this many parts of r: short fractions, and no machine's last bit in them."""

_READS: dict[str, tuple[str, ...]] = {
    "none": (),
    "constant": ("omission_rate",),
    "linear": ("omission_rate", "start"),
    "cosine": ("omission_rate", "start"),
    "ladder": ("omission_rate", "start", "rungs"),
    "mst": ("omission_rate", "warmup", "restoration", "stages", "interval"),
}
_FLAGS = {
    "omission_rate": "--sat-omission-rate",
    "start": "--sat-schedule-start",
    "rungs": "--sat-rungs",
    "warmup": "--mst-warmup",
    "restoration": "--mst-restoration",
    "stages": "--mst-stages",
    "interval": "--mst-interval",
}

KINDS = tuple(_READS)
"""What ``--sat-schedule`` takes."""


def parse_rate(value: Rate) -> Fraction:
    """An omission rate as it was written: 0.96, "0.96", "24/25" are all exactly 24/25.

    A float stands for the shortest decimal that prints as it. Raises ValueError for what is no number, or
    not in [0, 1).
    """
    try:
        rate = Fraction(repr(float(value)) if isinstance(value, float) else value)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError):
        raise ValueError(f"--sat-omission-rate must be a number such as 0.5 or 1/2, got {value!r}") from None
    return _checked_rate(rate)


def _checked_rate(rate: Fraction) -> Fraction:
    if not 0 <= rate < 1:
        raise ValueError(
            f"--sat-omission-rate must be in [0, 1), got {float(rate):g}; it is the share left out: "
            "0.5 omits every second neuron, 0 is dense"
        )
    return rate


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Which schedule, over how many steps. None means not given; a kind wants just what it reads."""

    kind: str = "none"
    """ladder (LORS, eq. 11), constant, linear, cosine, mst (Mixed Sparsity Training), or none (dense)."""
    omission_rate: Fraction | None = None
    """r, the highest rate, exact (`parse_rate`), in [0, 1); all but mst begin with it. Every kind but none."""
    start: int | None = None
    """η, the last step at rate r, in 0..T; T never comes down. ladder, linear, cosine."""
    rungs: int | None = None
    """L, stages of the descent, the last one dense; at least 1. ladder."""
    warmup: int | None = None
    """Steps of the ascent from dense to r. mst."""
    restoration: int | None = None
    """Steps of the descent back to dense. mst."""
    stages: int | None = None
    """n, stages of each of the two, at least 1 and none shorter than an interval. mst."""
    interval: int | None = None
    """Δ, steps at whose multiples alone the rate changes, at least 1. mst."""
    train_iters: int
    """T, optimizer updates of the whole run, at least 1."""

    def __post_init__(self) -> None:
        if self.kind not in _READS:
            raise ValueError(f"--sat-schedule must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.train_iters < 1:
            raise ValueError(f"--train-iters must be at least 1, got {self.train_iters}")
        for field in _FLAGS:
            self._check_presence(field)
        if self.omission_rate is not None:
            self._check_exact(self.omission_rate)
            _checked_rate(self.omission_rate)
        if self.start is not None and not 0 <= self.start <= self.train_iters:
            raise ValueError(
                f"--sat-schedule-start must be between 0 and --train-iters ({self.train_iters}), "
                f"got {self.start}; it is the last step at the full omission rate"
            )
        if self.rungs is not None and self.rungs < 1:
            raise ValueError(
                f"--sat-rungs must be at least 1, got {self.rungs}; 1 goes from the rate to dense at once"
            )
        if self.kind == "mst":
            self._check_phases()

    def _check_phases(self) -> None:
        assert self.warmup is not None and self.restoration is not None
        assert self.stages is not None and self.interval is not None
        for field in ("stages", "interval"):
            if getattr(self, field) < 1:
                raise ValueError(f"{_FLAGS[field]} must be at least 1, got {getattr(self, field)}; leave it out")
        least = self.stages * self.interval
        for field in ("warmup", "restoration"):
            if getattr(self, field) < least:
                raise ValueError(
                    f"{_FLAGS[field]} must be at least --mst-stages x --mst-interval ({self.stages} x {self.interval}),"
                    f" got {getattr(self, field)}; no stage may be shorter than an interval"
                )
        if self.warmup + self.restoration > self.train_iters:
            raise ValueError(
                f"--mst-warmup and --mst-restoration must fit into --train-iters ({self.train_iters}), got "
                f"{self.warmup} and {self.restoration}; shorten them"
            )

    def _check_presence(self, field: str) -> None:
        value, flag, wanted = getattr(self, field), _FLAGS[field], field in _READS[self.kind]
        if wanted and value is None:
            raise ValueError(f"--sat-schedule {self.kind} needs {flag}, which is not given; add it")
        dense_twice = field == "omission_rate" and value == 0  # none and rate 0 say the same
        if not wanted and value is not None and not dense_twice:
            users = ", ".join(kind for kind in KINDS if field in _READS[kind])
            raise ValueError(
                f"{flag} has no effect with --sat-schedule {self.kind}, got {value}; "
                f"drop it or choose one of {users}"
            )

    @staticmethod
    def _check_exact(rate: object) -> None:
        exact = isinstance(rate, Fraction | int)
        if not exact:
            raise ValueError(
                f"omission_rate must be an exact Fraction, got {rate!r}; use parse_rate({rate!r})"
            )


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A run of steps at one rate."""

    first: int
    """First step, from 1."""
    last: int
    """Last step, itself included."""
    rate: Fraction
    """Omission rate of all of them."""

    @property
    def steps(self) -> int:
        """How many steps it lasts."""
        return self.last - self.first + 1


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Omission rates of the steps 1..T."""

    last_step: int
    """T."""
    rate_at: Callable[[int], Fraction]
    """The rate of a step in 1..T; it must never fall up to `turn`, and never rise after it."""
    turn: int = 0
    """The last step of an ascent; 0 where there is none."""

    def rate(self, step: int) -> Fraction:
        """Omission rate of ``step``. Raises ValueError outside 1..T."""
        if not 1 <= step <= self.last_step:
            raise ValueError(
                f"a schedule's step must be between 1 and {self.last_step} (--train-iters), got {step}; "
                "evaluation and export are dense and ask for no rate"
            )
        return self.rate_at(step)

    def rungs(self) -> list[Rung]:
        """The runs of equal rate, in order, covering 1..T without a gap."""
        rungs: list[Rung] = []
        while (first := rungs[-1].last + 1 if rungs else 1) <= self.last_step:
            rate, last = self.rate_at(first), self._last_of_run(first)
            if rungs and rungs[-1].rate == rate:  # the turn lies inside a rung
                first = rungs.pop().first
            rungs.append(Rung(first=first, last=last, rate=rate))
        return rungs

    def mean_rate(self) -> Fraction:
        """Mean omission over all steps: the share of neuron-steps left out."""
        return sum((rung.steps * rung.rate for rung in self.rungs()), Fraction(0)) / self.last_step

    def _last_of_run(self, first: int) -> int:
        """Last step with the rate of ``first``: doubling strides, then bisection: runs may be long."""
        rate, stride, end = self.rate_at(first), 1, self.turn if first <= self.turn else self.last_step
        while first + stride <= end and self.rate_at(first + stride) == rate:
            stride *= 2
        steps = range(first, min(first + stride, end) + 1)
        return first - 1 + bisect_right(steps, False, key=lambda step: self.rate_at(step) != rate)


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that ``config`` describes."""
    if config.kind == "mst":
        return _phases(config)
    rate, end = Fraction(config.omission_rate or 0), config.train_iters
    start = end if config.start is None else config.start  # constant and none never come down
    shares: dict[str, Callable[..., Fraction]] = {
        "linear": linear_share,
        "cosine": cosine_share,
        "ladder": partial(ladder_share, rungs=config.rungs or 1),  # only the ladder has rungs
    }

    def rate_at(step: int) -> Fraction:
        return rate if step <= start else rate * shares[config.kind](step - start, out_of=end - start)

    return Schedule(last_step=end, rate_at=rate_at)


def _phases(config: ScheduleConfig) -> Schedule:
    """MST: warm-up, ultra-sparsification, restoration, as the mirror of the first. Rates change with the intervals."""
    assert config.warmup is not None and config.restoration is not None
    assert config.stages is not None and config.interval is not None
    rate, stages, interval = Fraction(config.omission_rate or 0), config.stages, config.interval
    warmup, restoration, end = config.warmup, config.restoration, config.train_iters

    def rate_at(step: int) -> Fraction:
        first = step - (step - 1) % interval
        if first <= warmup:
            return rate * cubic_share((first - 1) * stages // warmup, out_of=stages)
        if first > end - restoration:
            return rate * cubic_share((end - first) * stages // restoration, out_of=stages)
        return rate

    return Schedule(last_step=end, rate_at=rate_at, turn=min(math.ceil(warmup / interval) * interval, end))


def cubic_share(stage: int, *, out_of: int) -> Fraction:
    """MST's share of s_u in stage k of n: 1 - (1 - k/n)^3, exact; 0 in the first one, k = 0."""
    return 1 - (1 - Fraction(stage, out_of)) ** 3


def linear_share(done: int, *, out_of: int) -> Fraction:
    """A straight line from 1 to 0, exact."""
    return 1 - Fraction(done, out_of)


def ladder_share(done: int, *, out_of: int, rungs: int) -> Fraction:
    """The share of r that rung l leaves, max(0, 1 - l / L), at ``done`` = t - η of ``out_of`` = T - η steps.

    Eq. 11 wants the least whole l with done / out_of < (2^l - 1) / (2^L - 1), that is, with 2^l - 1 > q where
    q = done (2^L - 1) / out_of. As l is whole, the floor of q serves too: l is the binary digits of it + 1.
    """
    rung = (done * (2**rungs - 1) // out_of + 1).bit_length()
    return max(Fraction(0), 1 - Fraction(rung, rungs))


def cosine_share(done: int, *, out_of: int) -> Fraction:
    """Half a cosine from 1 to exactly 0, in steps of 1 / COSINE_GRID."""
    return Fraction(round(COSINE_GRID * (1 + math.cos(math.pi * done / out_of)) / 2), COSINE_GRID)
