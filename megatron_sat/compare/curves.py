"""The picture of a comparison: validation loss over training time, by domain, and the omission rate."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_sat.compare.report import Comparison
from megatron_sat.compare.runs import Run

COLOURS = ("#1b1b1b", "#d1495b", "#00798c", "#edae49", "#8d6a9f", "#66a182", "#2e4057", "#b5651d")
"""Of the runs, in the comparison's order; they repeat after the last."""


def draw_curves(comparison: Comparison, path: Path) -> None:
    """Write the picture to ``path``; its suffix says the format (.png, .svg, .pdf)."""
    figure = Figure(figsize=(5.2 * len(comparison.domains), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(comparison.domains), squeeze=False, sharex=True, height_ratios=(3, 1))
    for domain, (losses, rates) in zip(comparison.domains, panels.T, strict=True):
        _draw_losses(losses, comparison, domain=domain)
        _draw_rates(rates, comparison)
    panels[0, 0].set_ylabel("validation loss, nats a token")
    panels[1, 0].set_ylabel("omission rate")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)


def _coloured(comparison: Comparison) -> list[tuple[Run, str]]:
    return [(run, COLOURS[number % len(COLOURS)]) for number, run in enumerate(comparison.runs)]


def _draw_losses(axes: Axes, comparison: Comparison, *, domain: str) -> None:
    """Every curve begins where the start ended, out of the frame if that is far; a dot marks its end.

    Without a start it begins at the run's first evaluation. What diverged has no place in the picture.
    """
    before = None if comparison.start is None else comparison.start.final_loss[domain]
    losses = [point.loss[domain] for run in comparison.runs for point in run.validations]
    if finite := [loss for loss in losses if math.isfinite(loss)]:
        axes.set_ylim(*frame(finite, before=before))
    for run, colour in _coloured(comparison):
        points = [(point.elapsed_seconds, point.loss[domain]) for point in run.validations if point.step > 0]
        beginning = [] if before is None else [(0.0, before)]
        times, heights = zip(*beginning, *points, strict=True)
        axes.plot(times, heights, color=colour, linewidth=1.6, label=run.name)
        axes.plot(times[-1:], heights[-1:], color=colour, marker="o", markersize=5)
    axes.set_title(domain)
    axes.grid(alpha=0.25)


def frame(losses: list[float], *, before: float | None) -> tuple[float, float]:
    """Lowest and highest loss to show: all of them, and ``before`` where it does not double their range.

    losses: at least one, all finite.
    """
    low, high = min(losses), max(losses)
    if before is not None and max(high, before) - min(low, before) <= 2 * (high - low):
        low, high = min(low, before), max(high, before)
    margin = 0.08 * (high - low)
    return low - margin, high + margin


def _draw_rates(axes: Axes, comparison: Comparison) -> None:
    """The nominal rate; for runs that omit, also what quotas made of it: dotted attention, dashed MLP."""
    for run, colour in _coloured(comparison):
        times = [0.0, *(window.elapsed_seconds for window in run.windows)]
        _draw_steps(axes, times, [window.nominal_omission_rate for window in run.windows], color=colour)
        for kind, style in (("attention", ":"), ("mlp", "--")):
            effective = [window.omission_rate.get(kind, 0.0) for window in run.windows]
            if any(effective):
                _draw_steps(axes, times, effective, color=colour, linestyle=style, linewidth=1, alpha=0.7)
    axes.set_xlabel("training seconds")
    axes.set_ylim(bottom=-0.03)
    axes.grid(alpha=0.25)


def _draw_steps(axes: Axes, times: list[float], rates: list[float], **style: Any) -> None:
    """Each rate holds for the window that ends at its time; ``times`` has the beginning in front."""
    axes.step(times, [rates[0], *rates], where="pre", **style)
