"""The command line and the configuration file: from text to a `Config`, and back to text.

A setting may stand in a YAML file (``--config``), by its key or any of its names, with dashes or underscores,
flat or under headlines. Of several files a later one overrides an earlier one, and the command line all of them.
What is printed (``--print-config``) and saved with the run is the resolved configuration: given back, it is the
same run. Only here is YAML known.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_sat.config import Config, compose
from megatron_sat.flags.defaults import Machine, look_at_machine
from megatron_sat.flags.flag import Flag, Settings
from megatron_sat.flags.presets import fill_in
from megatron_sat.flags.refused import NEUTRAL
from megatron_sat.flags.table import complaint, table

_MERGE = "tag:yaml.org,2002:merge"
USAGE_ERROR = 2
"""What the process exits with for a command line that cannot be obeyed."""


class ParsedExit(SystemExit):
    """The command line asked for no run: for help, for the configuration, or for something impossible."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(code)
        self.said = said
        """What was printed, or would have been."""


def parse(
    argv: Sequence[str], *, world_size: int, cuda: bool, machine: Machine | None = None, speaks: bool = True
) -> Config:
    """The run that ``argv`` (without the program's name) describes, on ``world_size`` ranks.

    cuda: whether there is a GPU. machine: what else is there; looked up unless given. speaks: whether this
    process prints; on many ranks one of them is enough.
    Raises ParsedExit, with code 0 after --help and --print-config, and with code 2 after one line on stderr
    for what cannot be obeyed.
    """
    if "--help" in argv or "-h" in argv:
        _exit(0, help_text(), speaks=speaks)
    try:
        given, print_config = _given(argv)
        config = compose(fill_in(given), machine=machine or look_at_machine(cuda=cuda), world_size=world_size)
    except ValueError as error:
        _exit(USAGE_ERROR, f"error: {' '.join(str(error).split())}", speaks=speaks)
    if print_config:
        notes = "".join(f"# {line}\n" for line in config.remarks)
        _exit(0, notes + as_yaml(config.settings), speaks=speaks)
    return config


def save_resolved(config: Config, path: Path) -> None:
    """Write the configuration, as --print-config prints it, to ``path``. One rank only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_yaml(config.settings))


def as_yaml(settings: Settings) -> str:
    """Settings under their headlines, in the table's order."""
    sections: dict[str, dict[str, Any]] = {}
    for flag in table().working:
        if settings.get(flag.key) is not None:
            sections.setdefault(flag.section, {})[flag.key] = settings[flag.key]
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=110)


def help_text() -> str:
    """Every working setting under its headline: names, values, default, meaning."""
    sections: dict[str, list[str]] = {}
    for flag in table().working:
        names = ", ".join(flag.all_names) + ("" if flag.kind == "bool" else f" {placeholder(flag)}")
        default = "" if flag.default in (None, "") else f" (default: {flag.default})"
        sections.setdefault(flag.section, []).append(f"  {names}\n      {flag.help}{default}")
    usage = (
        "pretrain_sat.py [--config FILE.yaml ...] [--print-config] [setting ...]\n"
        "pretrain_sat.py --dry-run [--world-size N] [--gpu NAME] [--gpus-per-host N] ...\n"
        "    only says what the run would be on that cluster; needs no GPU, data or checkpoint\n\n"
        "Settings have Megatron-LM's names where Megatron-LM has them. In the file each is a key.\n"
    )
    return usage + "".join(f"\n{title}:\n" + "\n".join(lines) + "\n" for title, lines in sections.items())


def placeholder(flag: Flag) -> str:
    """What stands for the value in help: its choices, or its kind."""
    one = "{" + ",".join(map(str, flag.choices)) + "}" if flag.choices else flag.kind.upper()
    return {"": one, "+": f"{one} ...", "*": f"[{one} ...]"}[flag.many]


def _exit(code: int, said: str, *, speaks: bool) -> NoReturn:
    if speaks:
        (sys.stderr if code else sys.stdout).write(said.rstrip("\n") + "\n")
    raise ParsedExit(code, said)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.replace("argument ", "", 1))


def _parser() -> argparse.ArgumentParser:
    """All names of the table; each gives the text that stood there, to be read by its `Flag`."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", nargs="+")
    parser.add_argument("--print-config", action="store_true")
    for flag in table().flags.values():
        if flag.names:
            parser.add_argument(*flag.names, dest=flag.key, nargs=flag.many or None)
        for name, value in flag.presets.items():
            parser.add_argument(name, dest=flag.key, action="store_const", const=value)
    return parser


def _given(argv: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """What files and command line give, by key, and whether the configuration is only to be printed."""
    command_line = _read_command_line(argv)
    files, print_config = command_line.pop("config", []), command_line.pop("print_config", False)
    given: dict[str, Any] = {}
    for file in files:
        given |= _read_file(Path(file))
    return given | command_line, print_config


def _read_command_line(argv: Sequence[str]) -> dict[str, Any]:
    """What was given, by key; "config" and "print_config" among it."""
    found, unknown = _parser().parse_known_args(list(argv))
    _refuse(unknown)
    given = vars(found)
    flags = table().flags
    for key in given.keys() & flags.keys():
        flag = flags[key]
        given[key] = flag.read(given[key], said=(flag.names or flag.all_names)[0])
    return given


def _refuse(unknown: Sequence[str]) -> None:
    """Raise ValueError for the first name that is no setting, unless what follows it asks for nothing."""
    for name, values in _groups(unknown):
        if not name:
            raise ValueError(f"{values[0]} stands where a setting's name should; names begin with --")
        if NEUTRAL.get(name) != tuple(values):
            raise ValueError(complaint(name))


def _groups(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Words as (name, values after it); the name is empty for values before the first one."""
    group: tuple[str, list[str]] | None = None
    for word in words:
        if word.startswith("--"):
            if group is not None:
                yield group
            name, equals, value = word.partition("=")
            group = (name, [value] if equals else [])
        else:
            group = group or ("", [])
            group[1].append(word)
    if group is not None:
        yield group


class Loader(yaml.SafeLoader):
    """YAML's plain types; a key given twice is an error, where PyYAML would take the last.

    What ``<<`` brings in gives way to the mapping's own keys, as in YAML.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flat: list[yaml.MappingNode] = []

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(known is node for known in self._flat):  # by a mapping that brings this one in: its keys are all there
            return
        self._flat.append(node)
        keys = ["<<" if key.tag == _MERGE else self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} is given twice")
        super().flatten_mapping(node)


def _read_file(path: Path) -> dict[str, Any]:
    """What a YAML file gives, by key. Raises ValueError for one that cannot be read or holds unknown keys."""
    try:
        content = yaml.load(path.read_text(), Loader=Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--config must be a readable text file, {path} is not: {error}; check the path"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(
            f"--config must be YAML, {path} is not: {' '.join(str(error).split())}; mend it"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"--config must hold keys and values, {path} does not; --print-config shows how")
    given: dict[str, Any] = {}
    for key, value in _entries(content, path=path):
        flag, plain = _meaning(str(key), value, path=path)
        if plain is None:
            continue
        if flag.key in given:
            raise ValueError(f"{path}: {key} is given twice; leave one out")
        given[flag.key] = plain
    return given


def _entries(content: dict[Any, Any], *, path: Path) -> Iterator[tuple[Any, Any]]:
    """Keys and values, headlines taken away."""
    headlines = {flag.section for flag in table().working}
    for key, value in content.items():
        if isinstance(value, dict):
            if key not in headlines:
                raise ValueError(
                    f"{path}: {key} is no headline; the headlines are {', '.join(sorted(headlines))}"
                )
            yield from value.items()
        elif value is not None or key not in headlines:
            yield key, value


def _meaning(key: str, value: Any, *, path: Path) -> tuple[Flag, Any]:
    """The setting that a file's key means, and its value; None is: not given."""
    flag = table().find(key)
    if flag is None:
        name = "--" + key.lstrip("-").replace("_", "-")
        raise ValueError(f"{path}: {complaint(name)}")
    preset = flag.preset(key)
    if preset is None or value is None:
        return flag, flag.read(value, said=f"{path}: {key}")
    if not isinstance(value, bool):
        raise ValueError(f"{path}: {key} must be true or false, got {value!r}")
    if flag.kind == "bool":
        return flag, preset == value
    return flag, preset if value else None
