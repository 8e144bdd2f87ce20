"""The pictures: which lines they have, read back from matplotlib's own objects."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_sat.compare.history import Point
from megatron_sat.compare.pictures import draw_progress, draw_trend
from megatron_sat.compare.study import Spread
from tests.compare.studies import study


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def _labelled(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())] for line in lines}


def test_every_group_but_those_at_rate_zero_has_its_mean_over_time_and_operations(
    saved: list[Figure], tmp_path: Path
) -> None:
    draw_progress(study(tmp_path), tmp_path / "progress.png")
    over_time, over_flops = saved[0].axes[0], saved[0].axes[2]
    assert (saved[0].axes[0].get_title(), saved[0].axes[1].get_title()) == ("zh", "en")
    times, flops = _labelled(over_time), _labelled(over_flops)
    assert list(times) == list(flops) == ["dense", "sat", "dense_80_steps"]
    assert times["sat"][0] == (0, 9.0)
    assert times["sat"][-1] == pytest.approx((40, 5.3))
    assert flops["sat"][-1] == pytest.approx((6e10, 5.3))


def test_each_seed_has_a_thin_line_of_its_own(saved: list[Figure], tmp_path: Path) -> None:
    draw_progress(study(tmp_path), tmp_path / "progress.png")
    thin = [line for line in saved[0].axes[0].get_lines() if line.get_linewidth() == 0.7]
    ends = sorted(float(np.asarray(line.get_xydata())[-1, 1]) for line in thin)
    assert ends == pytest.approx([5.0, 5.1, 5.1, 5.2, 5.2, 5.4])


def test_bits_a_character_stand_beside_the_loss_where_the_text_was_counted(
    saved: list[Figure], tmp_path: Path
) -> None:
    draw_progress(study(tmp_path), tmp_path / "progress.png")
    zh, en = (axes.child_axes for axes in saved[0].axes[:2])
    assert [axes.get_ylabel() for axes in zh] == ["bits a character"]
    assert en == []


def test_losses_that_are_no_numbers_leave_a_picture(saved: list[Figure], tmp_path: Path) -> None:
    made = study(tmp_path)
    for trial in made.groups["sat"].trials.values():
        for point in trial.run.validations:
            dict.__setitem__(point.loss, "zh", float("nan"))  # type: ignore[index]
    draw_progress(made, tmp_path / "progress.png")
    low, high = saved[0].axes[0].get_ylim()
    assert 4 < low < high < 10


def _point(at: str, variant: str, *values: float, figure: str = "zh_bpc") -> Point:
    return Point(
        at=at,
        name="small",
        commits="abc",
        machine="here",
        settings_digest="d1",
        variant=variant,
        figure=figure,
        spread=Spread(values=dict(enumerate(values, 1))),
    )


def test_a_trend_has_a_line_a_variant_and_a_panel_a_figure(saved: list[Figure], tmp_path: Path) -> None:
    points = [_point("2026-01-01", "sat", 3.0, 3.5), _point("2026-01-01", "dense", 2.0)]
    points += [_point("2026-02-01", "sat", 2.5, 2.5), _point("2026-02-01", "sat", 9.0, figure="seconds")]
    points += [_point("2026-02-01", "dense", float("inf"))]
    draw_trend(points, tmp_path / "trend.png")
    above, below = saved[0].axes
    assert (above.get_ylabel(), below.get_ylabel()) == ("zh_bpc", "seconds")
    _, labels = above.get_legend_handles_labels()
    assert labels == ["sat, d1", "dense, d1"]
    sat, dense = (container.lines[0] for container in above.containers)  # type: ignore[attr-defined]
    assert list(sat.get_ydata()) == [3.25, 2.5]
    assert list(dense.get_ydata()) == [2.0]
