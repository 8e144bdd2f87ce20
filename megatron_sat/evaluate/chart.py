"""The picture of results: bits per character, a group of bars for each domain and average."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_sat.evaluate.result import Result, check_comparable, lines_of

COLOURS = ("#2e4057", "#d1495b", "#00798c", "#edae49", "#8d6a9f", "#66a182", "#1b1b1b", "#b5651d")
"""Of the results in their order; they repeat after the last."""


def draw_chart(results: Sequence[Result], path: Path) -> None:
    """Write the picture to ``path``; its suffix says the format (.png, .svg, .pdf).

    Raises ValueError for results that do not compare.
    """
    check_comparable(results)
    groups = list(lines_of(results[0]))
    width = 0.8 / len(results)
    figure = Figure(figsize=(max(5.0, 1.5 + 0.45 * len(groups) * (1 + len(results) / 2)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, result in enumerate(results):
        heights = [measures.bits_per_character for measures in lines_of(result).values()]
        places = [group + (number - (len(results) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(places, heights, width=width, color=COLOURS[number % len(COLOURS)], label=result.name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.set_ylabel("bits per character")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
    figure.legend(loc="outside upper center", ncols=min(4, len(results)), frameon=False)
    figure.savefig(path, dpi=130)
