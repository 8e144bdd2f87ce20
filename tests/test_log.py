"""What a person reads: rank 0 speaks, once where once is enough, and text is shown as it is written."""

import io
import warnings

import pytest
from rich.console import Console

from megatron_sat import log
from tests.helpers.ranks import run_ranks


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the console prints, on a terminal 100 columns wide."""
    out = io.StringIO()
    console = Console(file=out, width=100, highlight=False, soft_wrap=True, force_terminal=True, color_system=None)
    monkeypatch.setattr(log, "_console", console)
    return out


@pytest.fixture
def nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_warned", set())


def test_a_line_is_said_as_it_is_written(screen: io.StringIO) -> None:
    log.say("keep [bold]4[/bold] of 8: [s, b, h]")
    assert screen.getvalue() == "keep [bold]4[/bold] of 8: [s, b, h]\n"


def test_a_long_line_is_not_broken(screen: io.StringIO) -> None:
    log.say("x" * 300)
    assert screen.getvalue() == "x" * 300 + "\n"


def speak(_: int) -> tuple[bool, str, int]:
    """Whether this rank speaks, what it printed, and how often it warned."""
    out = io.StringIO()
    log._console = Console(file=out, width=100)
    log._warned = set()
    log.say("hello")
    log.table("title", ["a"], [[1]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log.warn_once("careful")
    return log.speaks(), out.getvalue(), len(caught)


def test_rank_0_speaks_and_the_others_are_silent() -> None:
    (first, printed, warned), *others = run_ranks(speak, 3)
    assert first and "hello" in printed and "title" in printed and warned == 1
    assert others == [(False, "", 0)] * 2


@pytest.mark.usefixtures("nothing_warned")
def test_a_warning_is_given_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in ("no effect", "no effect", "something else", "no effect"):
            log.warn_once(text)
    assert [str(warning.message) for warning in caught] == ["no effect", "something else"]


@pytest.mark.usefixtures("nothing_warned")
def test_a_warning_points_at_who_gave_it() -> None:
    with pytest.warns(UserWarning, match="here") as caught:
        log.warn_once("here")
    assert caught[0].filename == __file__


def test_a_table_shows_brackets_and_sets_numbers_to_the_right(screen: io.StringIO) -> None:
    log.table("plan", ["rung", "rate"], [["[first]", 5], ["second", 1000]])
    lines = screen.getvalue().splitlines()
    assert lines[0].startswith("plan")
    assert "│ [first] │    5 │" in lines[-3] and "│ second  │ 1000 │" in lines[-2]


def test_a_table_without_rows_has_its_head(screen: io.StringIO) -> None:
    log.table("empty", ["rung"], [])
    assert "rung" in screen.getvalue()


def test_progress_is_drawn_on_a_terminal(screen: io.StringIO) -> None:
    with log.progress(4, "tokens [read]") as advance:
        advance(3)
        advance()
    assert "tokens [read]" in screen.getvalue() and "4/4" in screen.getvalue()


def test_progress_is_silent_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(log, "_console", Console(file=out))
    with log.progress(None, "work") as advance:
        advance(3)
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    "text, heard",
    [
        ("Transformer Engine and Apex are not installed. Falling back to Torch optimizers.", False),
        ("Apex is not installed. Falling back to Torch Norm", False),
        ("--sat-temperature has no effect", True),
    ],
)
def test_quiet_libraries_are_quiet_and_we_are_not(text: str, heard: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log.quiet_libraries()
        warnings.warn(text, stacklevel=1)
    assert bool(caught) == heard
