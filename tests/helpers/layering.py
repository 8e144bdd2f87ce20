"""Reads the source as text and says where it breaks the house's rules: nothing is imported, nothing runs.

Each rule is a function of a `House` (a tree and its table, tests/layering.toml) and returns one sentence a
breach, ``path:line: what, and the way out``. Imports count wherever they stand: at the top, in a function,
under ``TYPE_CHECKING``, or as ``importlib.import_module("...")``.
"""

import ast
import fnmatch
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

PACKAGE = "megatron_sat"
SOURCE = (PACKAGE, "tools", "benchmarks", "examples", "scripts")
"""Folders whose imports are judged, with the Python files at the top level; tests/ may import everything."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name: ``from a.b import c`` is ``a.b.c``, whether c is a module or not."""

    line: int
    name: str
    relative: bool


@dataclass(frozen=True, kw_only=True)
class Source:
    """One Python file, parsed."""

    path: str
    """Relative to the tree's root, with slashes."""
    lines: int
    tree: ast.Module
    imports: list[Import] = field(default_factory=list)

    @property
    def module(self) -> str:
        """Dotted name: ``a/b/__init__.py`` is ``a.b``."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str | None:
        """The room of megatron_sat that the file belongs to: "" for its ``__init__``, None on the roof."""
        if self.path == f"{PACKAGE}/__init__.py":
            return ""
        parts = self.module.split(".")
        return parts[1] if parts[0] == PACKAGE else None


@dataclass(frozen=True, kw_only=True)
class House:
    """A tree of source files and the table that governs it."""

    source: list[Source]
    tests: list[Source]
    table: dict[str, Any]

    @property
    def modules(self) -> set[str]:
        """Dotted names of all files whose imports are judged."""
        return {file.module for file in self.source}

    def may_import(self, room: str) -> set[str]:
        """The rooms that ``room`` sees, floors written out; KeyError for a room without a row."""
        floors = self.table["floors"]
        return {seen for name in self.table["may_import"][room] for seen in floors.get(name, [name])}


def read_house(root: Path) -> House:
    """The house at ``root``, with the table in its tests/layering.toml."""
    paths = [*root.glob("*.py"), *(path for folder in SOURCE for path in (root / folder).rglob("*.py"))]
    return House(
        source=[_read(path, root=root) for path in sorted(paths)],
        tests=[_read(path, root=root) for path in sorted((root / "tests").rglob("*.py"))],
        table=tomllib.loads((root / "tests" / "layering.toml").read_text(encoding="utf-8")),
    )


def _read(path: Path, *, root: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(path))
    name = path.relative_to(root).as_posix()
    return Source(path=name, lines=len(text.splitlines()), tree=tree, imports=list(_imports(tree)))


def _imports(tree: ast.Module) -> Iterator[Import]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (Import(line=node.lineno, name=alias.name, relative=False) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                for alias in names:
                    name = ".".join(filter(None, [module, alias.name]))
                    yield Import(line=node.lineno, name=name, relative=level > 0)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if _is_importer(func):
                yield Import(line=node.lineno, name=name, relative=name.startswith("."))


def _is_importer(func: ast.expr) -> bool:
    return ast.unparse(func) in {"__import__", "import_module", "importlib.import_module"}


def direction(house: House) -> list[str]:
    """Imports between rooms that the table does not allow, files that belong to no row, relative imports."""
    said = []
    for file in house.source:
        if file.room and file.room not in house.table["may_import"]:
            said.append(f"{file.path}: room {file.room} has no row in may_import; give it one")
            continue
        seen = house.may_import(file.room) | {file.room} if file.room else set()
        for found in file.imports:
            at = f"{file.path}:{found.line}"
            first, _, rest = found.name.partition(".")
            if found.relative:
                said.append(f"{at}: relative import of {found.name}; write it out from {PACKAGE}")
            elif first == PACKAGE and rest and file.room is not None and rest.split(".")[0] not in seen:
                room, target = file.room or "__init__", rest.split(".")[0]
                said.append(f"{at}: {room} may not import {target}; hand it the value, or move the code down")
            elif file.room is not None and first != PACKAGE and first in _first_party(house):
                said.append(f"{at}: {PACKAGE} may not import {found.name} from the roof")
    return said


def _first_party(house: House) -> set[str]:
    return {name.split(".")[0] for name in house.modules} | {"tests"}


def circles(house: House) -> list[str]:
    """A circle of files that import each other, and a circle among the table's own rows."""
    graph = {file.module: {_target(house, found.name) for found in file.imports} for file in house.source}
    files = {module: (targets & house.modules) - {module} for module, targets in graph.items()}
    rooms = {room: house.may_import(room) for room in house.table["may_import"]}
    said = []
    for kind, edges in (("files", files), ("rows of may_import", rooms)):
        try:
            TopologicalSorter(edges).prepare()
        except CycleError as error:
            said.append(f"a circle of {kind}: {' <- '.join(error.args[1])}; move what both need below them")
    return said


def _target(house: House, name: str) -> str:
    return name if name in house.modules else name.rpartition(".")[0]


def doors(house: House) -> list[str]:
    """Foreign packages that come in elsewhere than through their door, or have none."""
    said = []
    own = _first_party(house)
    for file in house.source:
        for found in file.imports:
            first = found.name.split(".")[0]
            if found.relative or first in own or first in sys.stdlib_module_names:
                continue
            fitting = [door for door in house.table["doors"] if f"{found.name}.".startswith(f"{door}.")]
            at = f"{file.path}:{found.line}"
            if not fitting:
                said.append(f"{at}: {found.name} has no door; add a row to [doors], or do without it")
                continue
            door = max(fitting, key=len)
            if not any(fnmatch.fnmatchcase(file.path, room) for room in house.table["doors"][door]):
                rooms = ", ".join(house.table["doors"][door])
                said.append(f"{at}: {door} comes in through {rooms} only; call that room")
    return said


def environment(house: House) -> list[str]:
    """Reads of the process environment outside the rooms that are for it."""
    said = []
    for file in house.source:
        if file.room is None or file.room in house.table["environment"]["rooms"]:
            continue
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"}:
                said.append(f"{file.path}:{node.lineno}: {ast.unparse(node)}; take the value as an argument")
    return said


def sizes(house: House) -> list[str]:
    """Files longer than a room may be, tests included."""
    limit = house.table["max_lines"]
    return [
        f"{file.path}: {file.lines} lines, at most {limit}; make two rooms of it"
        for file in [*house.source, *house.tests]
        if file.lines > limit
    ]


def names(house: House) -> list[str]:
    """Files and folders named after nothing in particular."""
    banned = set(house.table["banned_names"])
    return [
        f"{file.path}: {found.pop()} says nothing; name it after what it holds"
        for file in house.source
        if (found := banned & set(file.module.split(".")))
    ]


def docstrings(house: House) -> list[str]:
    """Files that do not say what they hold; a file without a statement holds nothing."""
    return [
        f"{file.path}: no docstring; say what the file holds and what it leaves to others"
        for file in [*house.source, *house.tests]
        if file.tree.body and ast.get_docstring(file.tree) is None
    ]


RULES = (direction, circles, doors, environment, sizes, names, docstrings)
