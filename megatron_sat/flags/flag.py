"""One setting: the names it goes by on the command line, the values it takes, and how a value is read.

A value is kept in its plain form (int, float, str, bool, list, None), as it stands in a YAML file; rooms that
need a dtype, a Fraction or an enum make it from there. Nothing here knows which settings there are.
"""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["int", "float", "str", "bool", "rate", "pattern"]
Settings = Mapping[str, Any]
"""Every setting by its key, in plain form; None is: not given, and no default."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A setting with its names."""

    key: str
    """Its name in a YAML file and in `Settings`, with underscores."""
    kind: Kind = "str"
    names: tuple[str, ...] = ()
    """Names that take a value, each with its leading ``--``. Empty for a boolean."""
    presets: Mapping[str, Any] = field(default_factory=dict)
    """Names that take no value: name to the value they stand for."""
    many: Literal["", "+", "*"] = ""
    """Several values after one name: at least one (+), or any number (*)."""
    choices: tuple[Any, ...] = ()
    default: Any = None
    """None where the machine, the layout or another setting decides."""
    section: str = "training"
    """Headline of the printed configuration that it stands under."""
    help: str = ""
    idle: str = ""
    """Why it does nothing here, for one that Megatron-LM's scripts carry; empty for a working one."""

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every name on the command line."""
        return (*self.names, *self.presets)

    def preset(self, key: str) -> Any:
        """What the name ``key``, dashed or not, stands for without a value; None where it takes one."""
        plain = underscored(key)
        if plain == self.key:
            return None
        return next((value for name, value in self.presets.items() if underscored(name) == plain), None)

    def read(self, value: Any, *, said: str) -> Any:
        """``value`` from a command line (text) or a YAML file (text or typed), in plain form.

        said: the name it was given under, for the message. Raises ValueError for a value of another kind.
        """
        if value is None:
            return None
        if self.many:
            items = value if isinstance(value, list) else str(value).split()
            return [self._read_one(item, said=said) for item in items]
        return self._read_one(value, said=said)

    def _read_one(self, value: Any, *, said: str) -> Any:
        try:
            plain = _READERS[self.kind](value)
        except (ValueError, TypeError, SyntaxError):
            raise ValueError(f"{said} must be {_NOUNS[self.kind]}, got {value!r}") from None
        if self.choices and plain not in self.choices:
            allowed = ", ".join(str(choice) for choice in self.choices)
            raise ValueError(f"{said} must be one of {allowed}, got {value!r}")
        return plain


def switch(key: str, *, yes: tuple[str, ...] = (), no: tuple[str, ...] = (), **more: Any) -> Flag:
    """A boolean: ``--key`` and ``--no-key``, and further names that switch it on (yes) or off (no)."""
    presets: dict[str, Any] = dict.fromkeys((dashed(key), *yes), True)
    presets |= dict.fromkeys((*no, dashed(f"no_{key}")), False)
    return Flag(key=key, kind="bool", presets=presets, **more)


def option(key: str, kind: Kind = "str", *names: str, **more: Any) -> Flag:
    """A setting that takes a value: ``--key`` and further names."""
    return Flag(key=key, kind=kind, names=(dashed(key), *names), **more)


def dashed(key: str) -> str:
    """The command-line name of a key."""
    return "--" + key.replace("_", "-")


def underscored(name: str) -> str:
    """A key as it may stand in a file, with dashes or underscores, and whatever dashes lead it."""
    return name.lstrip("-").replace("-", "_")


def layer_pattern(value: Any) -> int | list[int]:
    """An int, or a list of ints as Python spells it: ``([0]*3+[1])*2`` is [0, 0, 0, 1, 0, 0, 0, 1].

    Raises ValueError for anything else.
    """
    if isinstance(value, list):
        return [_integer(item) for item in value]
    if isinstance(value, str) and "[" in value:
        pattern = _evaluate(ast.parse(value, mode="eval").body)
        if isinstance(pattern, list):
            return pattern
        raise ValueError(value)
    return _integer(value)


def _evaluate(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.List(elts=items):
            return [_integer(_evaluate(item)) for item in items]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluate(left) + _evaluate(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _evaluate(left) * _evaluate(right)
    raise ValueError(ast.dump(node))


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(value)
    return float(value)


def _text(value: Any) -> str:
    if isinstance(value, bool | list | dict):
        raise ValueError(value)
    return str(value)


def _truth(value: Any) -> bool:
    words = {"true": True, "false": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, bool):
        return value
    raise ValueError(value)


_READERS: dict[Kind, Callable[[Any], Any]] = {
    "int": _integer,
    "float": _number,
    "str": _text,
    "bool": _truth,
    "rate": _text,
    "pattern": layer_pattern,
}
_NOUNS: dict[Kind, str] = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "rate": "a number such as 0.5 or 1/2",
    "pattern": "a whole number, or a list such as ([0]*3+[1])*2",
}
