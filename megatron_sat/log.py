"""What a person reads on the console: rank 0 speaks, through rich; the others are silent.

Rooms above hand over finished sentences, tables and progress; nobody else prints.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_console = Console(highlight=False, soft_wrap=True)
_warned: set[str] = set()


def speaks() -> bool:
    """Whether this process is the one that prints: rank 0, or a process without ranks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    """One line (or paragraph) for the reader; rank 0 only."""
    if speaks():
        _console.print(escape(text))


_NOISE = (
    ".*Transformer Engine and Apex are not installed.*",  # build.introduce says once what is in use
    "Apex is not installed.*",
    "full scope is deprecated.*",  # megatron-core 0.16 and 0.19 warn of their own default
    "MimoModelConfig is experimental.*",  # megatron-core 0.19 imports it with every model
    ".*`torch.distributed.* is deprecated.*",  # megatron.core's calls, torch 2.13 and newer
)


_NOISY_LOGGERS = (
    "megatron.core.rerun_state_machine",
    "megatron.core.dist_checkpointing.strategies.torch",
    "torch.utils.cpp_extension",  # that a CUDA toolkit lies on a machine without a GPU
)


def quiet_libraries() -> None:
    """Leave out what megatron.core and torch warn each other of on every rank, and no user can act on."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def warn_once(text: str) -> None:
    """A warning that is said once a process, on rank 0, and is visible to ``warnings`` filters in tests."""
    if text not in _warned and speaks():
        _warned.add(text)
        warnings.warn(text, UserWarning, stacklevel=2)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table: column heads, one sequence a row; numbers are right-aligned. Rank 0 only."""
    if not speaks():
        return
    drawn = Table(title=title, title_justify="left")
    rows = [list(row) for row in rows]
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        drawn.add_row(*(escape(str(cell)) for cell in row))
    _console.print(drawn)


class Advance(Protocol):
    """Tells a progress bar how much further the work is."""

    def __call__(self, amount: int = 1) -> None: ...


@contextmanager
def progress(total: int | None, description: str) -> Iterator[Advance]:
    """A progress bar over ``total`` units (None: unknown); yields what advances it. Rank 0 only."""
    if not speaks() or not _console.is_terminal:
        yield lambda amount=1: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console) as bar:
        task = bar.add_task(escape(description), total=total)
        yield lambda amount=1: bar.advance(task, amount)
