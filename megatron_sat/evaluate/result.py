"""What an evaluation found, as a file and as a table; several beside each other.

A perplexity is of tokens, and tokens differ between vocabularies; bits per character and per byte are of the text, so
they compare. For that the text must be the same: results that were made from other text are refused.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = ("megatron", "hf")
AVERAGE = "average"


@dataclass(frozen=True, kw_only=True)
class Measures:
    """How well text was predicted; the lower, the better."""

    loss: float
    """Nats a token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """Of the text in UTF-8."""
    bits_per_character: float
    """Of the text in Unicode code points."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """What was read of one kind of text, and what it cost."""

    documents: int
    tokens: int
    """Scored ones: all but the start."""
    characters: int
    bytes: int
    nats: float
    """Of all tokens together."""

    @property
    def measures(self) -> Measures:
        loss = self.nats / self.tokens
        bits = self.nats / math.log(2)
        return Measures(
            loss=loss,
            perplexity=math.exp(loss),
            bits_per_byte=bits / self.bytes,
            bits_per_character=bits / self.characters,
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model on some domains."""

    name: str
    """What tables and charts call it."""
    model: str
    """Its folder."""
    kind: str
    """One of KINDS."""
    step: int | None
    """Completed updates of a checkpoint; None for a model of Hugging Face's."""
    seq_length: int
    stride: int
    dtype: str
    tokenizer: str
    """Its fingerprint."""
    domains: Mapping[str, Domain]

    @property
    def average(self) -> Measures:
        """Over the domains, each counting the same."""
        return _mean([domain.measures for domain in self.domains.values()])

    @property
    def languages(self) -> dict[str, Measures]:
        """Over the domains of a language, what stands before the slash of their names; each counting the same."""
        names = dict.fromkeys(name.split("/", 1)[0] for name in self.domains if "/" in name)
        return {
            language: _mean(
                [domain.measures for name, domain in self.domains.items() if name.startswith(f"{language}/")]
            )
            for language in names
        }

    def save(self, path: Path) -> None:
        """Write it as JSON, with what follows from it."""
        content = asdict(self)
        for name, domain in self.domains.items():
            content["domains"][name] |= asdict(domain.measures)
        languages = {name: asdict(measures) for name, measures in self.languages.items()}
        content[AVERAGE] = asdict(self.average) | {"languages": languages}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Result":
        """Raises ValueError for a file that `save` did not write."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            del content[AVERAGE]
            domains = {name: _domain(values) for name, values in content.pop("domains").items()}
            if not domains or content["kind"] not in KINDS:
                raise ValueError("no domain, or no known kind")
            return Result(**content, domains=domains)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} must be a result of tools/evaluate.py, it is not: {error!r}; evaluate again"
            ) from error


def _domain(values: Mapping[str, Any]) -> Domain:
    return Domain(**{name: kind(values[name]) for name, kind in Domain.__annotations__.items()})


def _mean(measures: Sequence[Measures]) -> Measures:
    count = len(measures)
    loss = sum(each.loss for each in measures) / count
    return Measures(
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=sum(each.bits_per_byte for each in measures) / count,
        bits_per_character=sum(each.bits_per_character for each in measures) / count,
    )


# -- beside each other


def check_comparable(results: Sequence[Result]) -> None:
    """Raise ValueError for results of different text, and for two of one name."""
    names = [result.name for result in results]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"results beside each other must have different names, {names.count(name)} are named {name}; "
                "give this one another --name"
            )
    first = results[0]
    for result in results[1:]:
        for domain in dict.fromkeys([*first.domains, *result.domains]):
            mine, theirs = (_text(each.domains.get(domain)) for each in (first, result))
            if mine != theirs:
                raise ValueError(
                    f"results beside each other must be of the same text, {domain} is {mine} in {first.name} and "
                    f"{theirs} in {result.name}; evaluate both on the same files with the same limits"
                )


def _text(domain: Domain | None) -> str:
    if domain is None:
        return "missing"
    return f"{domain.documents} documents, {domain.characters} characters, {domain.bytes} bytes"


def remarks(results: Sequence[Result]) -> list[str]:
    """What a reader of the table must know."""
    windows = {(result.seq_length, result.stride) for result in results}
    said = [
        f"{result.name}: {result.model}"
        f"{'' if result.step is None else f', step {result.step}'}, windows of {result.seq_length} tokens, stride "
        f"{result.stride}, {result.dtype}"
        for result in results
    ]
    if len({result.tokenizer for result in results}) > 1:
        said.append(
            "The tokenizers differ: tokens, loss and perplexity do not compare, bits per character and byte do."
        )
    if len(windows) > 1:
        said.append("The windows differ: what reads more context has it easier.")
    said.append("Averages are over domains, each counting the same; their perplexity is exp(mean loss).")
    return said


_MEASURES: Mapping[str, str] = {
    "bits_per_character": "bits per character",
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "loss": "loss",
}


def lines_of(result: Result) -> dict[str, Measures]:
    """Every line of a table: domains, averages of the languages, the average."""
    lines = {name: domain.measures for name, domain in result.domains.items()}
    lines |= {f"{language}, {AVERAGE}": measures for language, measures in result.languages.items()}
    return lines | {AVERAGE: result.average}


def columns(results: Sequence[Result]) -> list[str]:
    """Heads of the table's columns."""
    if len(results) == 1:
        return ["domain", "characters", "tokens", *_MEASURES.values()]
    several = [f"{said}, {result.name}" for name, said in _MEASURES.items() if name != "loss" for result in results]
    return ["domain", "characters", *several]


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The table's rows. Raises ValueError for results that do not compare."""
    check_comparable(results)
    first = results[0]
    found = []
    for line in lines_of(first):
        domain = first.domains.get(line)
        sizes: list[Callable[[Domain], int]] = [lambda d: d.characters]
        if len(results) == 1:
            sizes.append(lambda d: d.tokens)
        cells = ["" if domain is None else f"{size(domain):,}" for size in sizes]
        names = [name for name in _MEASURES if len(results) == 1 or name != "loss"]
        cells += [_number(getattr(lines_of(result)[line], name)) for name in names for result in results]
        found.append([line, *cells])
    return found


def _number(value: float) -> str:
    return f"{value:.4f}" if value < 100 else f"{value:,.1f}"


def markdown(results: Sequence[Result]) -> str:
    """The table with its remarks. Raises ValueError for results that do not compare."""
    heads = columns(results)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows(results)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([table, "", *(f"- {remark}" for remark in remarks(results)), ""])
