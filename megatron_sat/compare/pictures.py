"""The pictures of a study: loss and bits a character over training time and over operations; and of a history: trends.

A thin line is a run, a thick one the mean of its group; at its end a bar of one standard deviation each way.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_sat.compare.curves import COLOURS, frame
from megatron_sat.compare.history import Point
from megatron_sat.compare.report import bits_per_character
from megatron_sat.compare.runs import Run, Validation
from megatron_sat.compare.study import Group, Spread, Study, flops_at

_AXES: Mapping[str, Callable[[Run, Validation], float]] = {
    "training seconds": lambda run, point: point.elapsed_seconds,
    "executed operations": lambda run, point: flops_at(run, point.step),
}


def draw_progress(study: Study, path: Path) -> None:
    """A column for each domain; above over time, below over operations. The suffix of ``path`` says the format."""
    domains = list(study.experiment.valid)
    figure = Figure(figsize=(5.4 * len(domains), 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(_AXES), len(domains), squeeze=False, sharex="row")
    for row, (said, place) in zip(panels, _AXES.items(), strict=True):
        for axes, domain in zip(row, domains, strict=True):
            _draw_domain(axes, study, domain=domain, place=place)
            axes.set_xlabel(said)
    for axes, domain in zip(panels[0], domains, strict=True):
        axes.set_title(domain)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), frameon=False)
    figure.savefig(path, dpi=120)


def _draw_domain(axes: Axes, study: Study, *, domain: str, place: Callable[[Run, Validation], float]) -> None:
    shown = [group for group in study.groups.values() if group.name not in study.rate_zero.values()]
    starts = {seed: losses[domain] for seed, losses in study.starts.items()}
    losses = [p.loss[domain] for g in shown for t in g.trials.values() for p in t.run.validations]
    for number, group in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        lines = [_line(trial.run, domain=domain, place=place, start=starts[s]) for s, trial in group.trials.items()]
        for line in lines if len(lines) > 1 else ():
            axes.plot(*line, color=colour, linewidth=0.7, alpha=0.5)
        mean = np.mean(lines, axis=0)
        axes.plot(*mean, color=colour, linewidth=1.8, label=group.name)
        bar = _final(group, domain=domain).std
        end = mean[:, -1:]
        axes.errorbar(end[0], end[1], yerr=None if math.isnan(bar) else bar, color=colour, marker="o", capsize=3)
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        axes.set_ylim(*frame(finite, before=min(starts.values())))
    axes.set_ylabel("validation loss, nats a token")
    axes.grid(alpha=0.25)
    rate = study.tokens_per_character.get(domain)
    if rate is not None:
        bit = bits_per_character(1.0, tokens_per_character=rate)
        both: Any = (lambda loss: loss * bit, lambda bits: bits / bit)
        axes.secondary_yaxis("right", functions=both).set_ylabel("bits a character")


def _line(
    run: Run, *, domain: str, place: Callable[[Run, Validation], float], start: float
) -> tuple[list[float], list[float]]:
    """Where it was and how far; every seed of a group has the same steps, so points belong together."""
    points = [(0.0, start), *((place(run, point), point.loss[domain]) for point in run.validations)]
    places, losses = zip(*points, strict=True)
    return list(places), list(losses)


def _final(group: Group, *, domain: str) -> Spread:
    return Spread(values={seed: trial.run.final_loss[domain] for seed, trial in group.trials.items()})


def draw_trend(points: Sequence[Point], path: Path) -> None:
    """A panel for each figure, a line for each variant under the same settings, from the oldest comparison on.

    points: at least one.
    """
    figures = list(dict.fromkeys(point.figure for point in points))
    moments = list(dict.fromkeys((point.at, point.commits) for point in points))
    figure = Figure(figsize=(max(6.0, 1.5 + 0.9 * len(moments)), 3.2 * len(figures)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(figures), 1, squeeze=False, sharex=True)
    for axes, name in zip(panels[:, 0], figures, strict=True):
        lines: dict[str, list[Point]] = {}
        for point in points:
            if point.figure == name and math.isfinite(point.spread.mean):
                lines.setdefault(f"{point.variant}, {point.settings_digest}", []).append(point)
        for number, (label, found) in enumerate(lines.items()):
            places = [moments.index((point.at, point.commits)) for point in found]
            bars = [0.0 if math.isnan(point.spread.std) else point.spread.std for point in found]
            means = [point.spread.mean for point in found]
            colour = COLOURS[number % len(COLOURS)]
            axes.errorbar(places, means, yerr=bars, marker="o", capsize=3, color=colour, label=label)
        axes.set_ylabel(name)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    panels[-1, 0].set_xticks(range(len(moments)), [f"{at[:10]}\n{commit}" for at, commit in moments], fontsize=7)
    figure.savefig(path, dpi=120)
