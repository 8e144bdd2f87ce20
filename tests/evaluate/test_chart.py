"""The chart: a bar for each line and result, and nothing for results that do not compare."""

from dataclasses import replace

import matplotlib.axes
import pytest

from megatron_sat.evaluate.chart import draw_chart
from tests.evaluate.test_result import AFTER, RESULT


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_written(tmp_path, suffix):
    draw_chart([RESULT, AFTER], tmp_path / f"chart.{suffix}")
    assert (tmp_path / f"chart.{suffix}").stat().st_size > 5000


def test_bars_are_as_high_as_the_bits_per_character(tmp_path, monkeypatch):
    drawn = []
    true_bar = matplotlib.axes.Axes.bar

    def bar(self, places, heights, **style):
        drawn.append((style["label"], heights))
        return true_bar(self, places, heights, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "bar", bar)
    draw_chart([RESULT, AFTER], tmp_path / "chart.png")
    assert [label for label, _ in drawn] == ["before", "after"]
    assert drawn[0][1] == pytest.approx([6.0, 12.0, 1.5, 9.0, 1.5, 6.5])


def test_results_of_different_text_are_not_drawn(tmp_path):
    with pytest.raises(ValueError, match="must be of the same text, zh/poetry"):
        draw_chart([RESULT, replace(AFTER, domains={"en/news": AFTER.domains["en/news"]})], tmp_path / "chart.png")
    assert list(tmp_path.iterdir()) == []
