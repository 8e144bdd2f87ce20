"""The picture: which lines it has, read back from matplotlib's own objects."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_sat.compare import curves
from megatron_sat.compare.curves import COLOURS, draw_curves
from megatron_sat.compare.report import Comparison
from tests.compare.synthetic import comparison


def _drawn(made: Comparison, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """Its figure, saved too."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_curves(made, folder / "curves.png")
    return figures[0]


@pytest.fixture
def figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure that was saved in tmp_path."""
    return _drawn(comparison(tmp_path), tmp_path, monkeypatch)


def _points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def _of(axes: Axes, colour: str) -> list[Line2D]:
    return [line for line in axes.get_lines() if line.get_color() == colour]


def test_the_picture_is_a_png(figure: Figure, tmp_path: Path) -> None:
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_each_domain_has_a_curve_of_every_run_from_the_start_to_its_final_loss(figure: Figure) -> None:
    zh = figure.axes[0]
    handles, labels = zh.get_legend_handles_labels()
    curves = {label: _points(line) for label, line in zip(labels, handles, strict=True)}  # type: ignore[arg-type]
    assert list(curves) == ["dense", "SAT", "equal-time"]
    ends = {name: (points[0], points[-1]) for name, points in curves.items()}
    assert ends["dense"] == ((0, 8.0), (50, 5.0))
    assert ends["SAT"] == ((0, 8.0), (40, 5.2))
    assert ends["equal-time"] == ((0, 8.0), (40, 5.1))
    assert figure.axes[1].get_title() == "en"


def test_without_a_start_a_curve_begins_with_the_first_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    draw_curves(replace(comparison(tmp_path), start=None), tmp_path / "curves.png")
    (dense, *_), _ = figures[0].axes[0].get_legend_handles_labels()
    assert _points(dense)[0] == (5.0, pytest.approx(8.6))  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["dense", "equal-time"])  # the first of all that is framed, and one of the last
def test_a_run_that_diverged_leaves_the_others_a_picture(
    loss: float, whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = _with_losses(comparison(tmp_path), loss, names=[whose])
    low, high = _drawn(drawn, tmp_path, monkeypatch).axes[0].get_ylim()
    assert 4 < low < 5.3 < high < 10


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_runs_that_all_diverged_leave_a_picture(loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _with_losses(comparison(tmp_path), loss, names=["dense", "SAT", "equal-time"])
    assert all(math.isfinite(limit) for limit in _drawn(drawn, tmp_path, monkeypatch).axes[0].get_ylim())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def _with_losses(made: Comparison, loss: float, *, names: list[str]) -> Comparison:
    """The comparison; the Chinese losses of some runs are this one."""
    for run in made.runs:
        for point in run.validations if run.name in names else ():
            dict.__setitem__(point.loss, "zh", loss)  # type: ignore[index]
    return made


def test_the_lower_panel_steps_down_with_the_omission_rate(figure: Figure) -> None:
    nominal, attention, mlp = _of(figure.axes[2], COLOURS[1])
    assert [line.get_linestyle() for line in (nominal, attention, mlp)] == ["-", ":", "--"]
    assert [rate for _, rate in _points(nominal)] == [0.5] * 6 + [0.0] * 5
    assert [rate for _, rate in _points(mlp)] == [0.25] * 6 + [0.0] * 5


def test_dense_runs_have_a_nominal_rate_of_zero_and_nothing_else(figure: Figure) -> None:
    (dense,) = _of(figure.axes[2], COLOURS[0])
    assert {rate for _, rate in _points(dense)} == {0.0}


@pytest.mark.parametrize(
    ("before", "low", "high"), [(40.0, 5.0, 6.0), (4.5, 4.5, 6.0), (6.9, 5.0, 6.9), (None, 5.0, 6.0)]
)
def test_the_frame_holds_all_losses_and_a_start_that_is_not_far(before: float | None, low: float, high: float) -> None:
    bottom, top = curves.frame([6.0, 5.0, 5.5], before=before)
    assert low - 0.2 < bottom < low
    assert high < top < high + 0.2
