"""What ``--data-path`` and its kin name: domains, each a data set with a name and a weight.

Megatron-LM's forms work as they are: one path; several paths; weights and paths in turn. Ours in addition: a
path may be written ``NAME=PATH``. Without a name a domain is called after its file, with as many folders as
tell it apart. Nothing here looks at the files.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_SUFFIX = "_text_document"
"""What preparing appends to the prefix it is given."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One data set of a blend."""

    name: str
    prefix: str
    """Path of the .bin and .idx without their endings."""
    weight: float | None
    """Share of the samples in proportion to the other domains' weights; None: in proportion to its tokens."""


def parse_domains(values: Sequence[str], *, flag: str) -> tuple[Domain, ...]:
    """The domains that a flag's values name, all of them with weights or none.

    Raises ValueError for weights that are not positive, values that do not alternate, and a name or path
    given twice.
    """
    values = [value.strip() for value in values]
    weights: list[float] | list[None] = [None] * len(values)
    if len(values) % 2 == 0 and all(_is_number(value) for value in values[::2]):
        weights, values = [_weight(value, flag=flag) for value in values[::2]], values[1::2]
    for value in values:
        if not value or _is_number(value):
            raise ValueError(
                f"{flag} must be paths, or weights and paths in turn, got {value!r} for a path; "
                f"write {flag} 0.7 first 0.3 second"
            )
    given = [_split_name(value) for value in values]
    paths = [path for _, path in given]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(
                f"{flag} must name a data set once, {path} is named {paths.count(path)} times; add up weights"
            )
    names = [name or shortest for (name, _), shortest in zip(given, _shortest_names(paths), strict=True)]
    require_distinct(names, flags=flag)
    return tuple(
        Domain(name=name, prefix=path, weight=weight)
        for name, path, weight in zip(names, paths, weights, strict=True)
    )


def require_distinct(names: Sequence[str], *, flags: str) -> None:
    """Raises ValueError when two domains have one name: reports could not tell them apart."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{flags}: domains must have different names, {name} is there {names.count(name)} times; "
                "name them NAME=PATH"
            )


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _weight(value: str, *, flag: str) -> float:
    weight = float(value)
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"{flag}: a weight must be positive, got {value}; leave the data set out instead")
    return weight


def _split_name(value: str) -> tuple[str | None, str]:
    name, equals, path = value.partition("=")
    if equals and path and _NAME.fullmatch(name):
        return name, path
    return None, value


def _shortest_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, with as many folders before it as no other path shares."""
    parts = [PurePath(path.removesuffix(_SUFFIX)).parts for path in paths]
    names = []
    for own in parts:
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        names.append("/".join(own[-depth:]))
    return names
