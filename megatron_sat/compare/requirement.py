"""Requirements of a comparison, as automation states them: ``sat.zh_bpc <= dense_equal_time.zh_bpc + 0.005``.

    requirement  sum  <= | < | >= | > | == | !=  sum
    sum          product { + | - product }
    product      factor { * | / factor }
    factor       number | name | - factor | ( sum )
    name         GROUP.FIGURE or GROUP.FIGURE.STATISTIC; without one the mean over seeds is meant

Nothing is evaluated but these. ``dense_equal_time`` alone is the control of the one variant that is named beside it.
Of seeds those count that all named groups have: a control at rate 0 may have one alone.
"""

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from megatron_sat.compare.experiment import EQUAL_TIME, language_of
from megatron_sat.compare.study import Spread, Study, figure_of

STATISTICS = ("mean", "std", "min", "max")
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)"
    r"|(?P<sign><=|>=|==|!=|[-+*/()<>]))"
)
_DEEPEST = 50
"""Parentheses and signs within each other."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a requirement holds, and the values of both its sides."""

    text: str
    holds: bool
    left: float
    right: float
    doubt: str | None = None
    """Why it cannot be judged; None: it can."""
    of: str = ""
    """The seeds that count, where they are not all."""

    def __str__(self) -> str:
        said = "holds" if self.holds else "does not hold"
        why = "" if self.doubt is None else f", for {self.doubt}"
        of = self.of and f" ({self.of})"
        return f"{self.text}: {said}, {self.left:.6g} against {self.right:.6g}{of}{why}"


@dataclass(frozen=True, kw_only=True)
class Name:
    """One number of a study."""

    group: str
    figure: str
    statistic: str


def judge(text: str, study: Study) -> Verdict:
    """Whether a requirement holds.

    A side that is no number, such as a loss that diverged or a figure that a group lacks, fulfils nothing, and neither
    does a control that did not have the time that it is named for. Raises what `check` raises of groups and statistics.
    """
    named = dict[Name, Spread]()
    doubts = list[str]()

    def look(name: Name) -> float:
        _check_known(name, text=text, groups=study.names)
        found = study.figures[study.names[name.group]]
        if name.figure in found:
            named[name] = found[name.figure]
        else:  # training is over: this is said, with all else that came of it
            doubts.append(f"{name.group} has no {name.figure}")
        return math.nan

    def value(name: Name) -> float:
        values = {seed: named[name].values[seed] for seed in seeds} if name in named else {}
        return float(getattr(Spread(values=values), name.statistic)) if values else math.nan

    _Parser(text, groups=study.names).requirement(look)
    each = [set(spread.values) for spread in named.values()]
    every, seeds = sorted(set().union(*each)), sorted(set.intersection(*each)) if each else []
    if each and not seeds:
        doubts.append(f"{' and '.join(dict.fromkeys(name.group for name in named))} have no seed in common")
    left, sign, right = _Parser(text, groups=study.names).requirement(value)
    known = not (math.isnan(left) or math.isnan(right))
    groups = [name.group for name in named]
    off = [v for v in study.equal_time if f"{EQUAL_TIME}_{v}" in groups and study.off_time(v)]
    doubts += [f"{EQUAL_TIME}_{variant} did not have the time of {variant}" for variant in off]
    return Verdict(
        text=text,
        holds=known and not doubts and _COMPARISONS[sign](left, right),
        left=left,
        right=right,
        doubt=doubts[0] if doubts else None,
        of="" if seeds in ([], every) else f"seed {', '.join(map(str, seeds))}, which all of them have",
    )


def check(text: str, *, groups: Collection[str], figures: Collection[str]) -> None:
    """Raise ValueError for what is no requirement, or names a group, figure or statistic that will not be there."""

    def value(name: Name) -> float:
        _check_known(name, text=text, groups=groups, figures=figures)
        return 1.0

    _Parser(text, groups=groups).requirement(value)


def without_bits(figures: Collection[str], *, domains: Collection[str], old: str | None) -> list[str]:
    """The names of figures that are left where nobody counted the text of these domains.

    A language has bits a character where all its domains have. old: the language that may be forgotten.
    """
    lost = {figure_of(name) for domain in domains for name in (domain, language_of(domain))}
    lost |= {"forgetting"} if old is not None and figure_of(old) in lost else set()
    return [figure for figure in figures if not (figure.endswith("_bpc") and figure.removesuffix("_bpc") in lost)]


def _check_known(name: Name, *, text: str, groups: Collection[str], figures: Collection[str] | None = None) -> None:
    """Raise ValueError for a name of what is not there. figures: None for any."""
    for what, given, known in (
        ("a group", name.group, groups),
        ("a figure", name.figure, figures),
        ("a statistic", name.statistic, STATISTICS),
    ):
        if known is not None and given not in known:
            raise ValueError(
                f"--require {text!r}: {given} must be {what} of this comparison; there are {', '.join(sorted(known))}"
            )


class _Parser:
    """Reads a requirement from left to right; `value` gives a name's number."""

    def __init__(self, text: str, *, groups: Collection[str]) -> None:
        self._text, self._groups = text, groups
        self._tokens = self._read()
        self._place, self._depth = 0, 0
        variants = {word.split(".")[0] for kind, word in self._tokens if kind == "name"} - {EQUAL_TIME}
        self._controlled = sorted(variant for variant in variants if f"{EQUAL_TIME}_{variant}" in groups)

    def requirement(self, value: Callable[[Name], float]) -> tuple[float, str, float]:
        left = self._sum(value)
        kind, sign = self._next()
        if sign not in _COMPARISONS:
            raise self._wrong(f"one of {' '.join(_COMPARISONS)} must stand between its sides, got {sign or 'its end'}")
        right = self._sum(value)
        kind, rest = self._next()
        if kind:
            raise self._wrong(f"it must end after its right side, got {rest}")
        return left, sign, right

    def _sum(self, value: Callable[[Name], float]) -> float:
        total = self._product(value)
        while self._peek() in ("+", "-"):
            _, sign = self._next()
            other = self._product(value)
            total = total + other if sign == "+" else total - other
        return total

    def _product(self, value: Callable[[Name], float]) -> float:
        total = self._factor(value)
        while self._peek() in ("*", "/"):
            _, sign = self._next()
            other = self._factor(value)
            total = total * other if sign == "*" else (total / other if other else math.nan)
        return total

    def _factor(self, value: Callable[[Name], float]) -> float:
        kind, word = self._next()
        if kind == "number":
            return float(word)
        if kind == "name":
            return value(self._named(word))
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._wrong(f"at most {_DEEPEST} signs and parentheses may stand within each other")
        if word == "-":
            found = -self._factor(value)
        elif word == "(":
            found = self._sum(value)
            if self._next()[1] != ")":
                raise self._wrong("a parenthesis must be closed")
        else:
            raise self._wrong(f"a number, a name or a parenthesis must stand where {word or 'its end'} is")
        self._depth -= 1
        return found

    def _named(self, word: str) -> Name:
        parts = word.split(".")
        if len(parts) not in (2, 3):
            raise self._wrong(f"a name must be GROUP.FIGURE or GROUP.FIGURE.STATISTIC, got {word}")
        group, figure, *statistic = parts
        if group == EQUAL_TIME and EQUAL_TIME not in self._groups:
            if len(self._controlled) != 1:
                controls = ", ".join(sorted(name for name in self._groups if name.startswith(EQUAL_TIME)))
                raise self._wrong(
                    f"{EQUAL_TIME} must be of one variant named beside it, got "
                    f"{' and '.join(self._controlled) or 'none'}; name the control: {controls or 'it was left out'}"
                )
            group = f"{EQUAL_TIME}_{self._controlled[0]}"
        return Name(group=group, figure=figure, statistic=(statistic or ["mean"])[0])

    def _read(self) -> list[tuple[str, str]]:
        tokens, place, text = [], 0, self._text.rstrip()
        while place < len(text):
            found = _TOKEN.match(text, place)
            if found is None:
                raise self._wrong(f"it may hold names, numbers, + - * / ( ) and a comparison, got {text[place:]!r}")
            assert found.lastgroup is not None
            tokens.append((found.lastgroup, found[found.lastgroup]))
            place = found.end()
        return tokens

    def _peek(self) -> str:
        return self._tokens[self._place][1] if self._place < len(self._tokens) else ""

    def _next(self) -> tuple[str, str]:
        token = self._tokens[self._place] if self._place < len(self._tokens) else ("", "")
        self._place += 1
        return token

    def _wrong(self, rule: str) -> ValueError:
        return ValueError(f"--require {self._text!r}: {rule}; write for instance sat.zh_bpc <= dense.zh_bpc + 0.005")
