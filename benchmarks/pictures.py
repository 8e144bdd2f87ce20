"""The benchmarks' pictures: each is one function from the rows of a result to a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, Any]
COLOURS = ("#1b1b1b", "#d1495b", "#00798c", "#edae49", "#8d6a9f", "#66a182")
FADED = "#c9c9c9"


def draw_step(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Bars of seconds a step, and how far operations alone would have brought each."""
    figure, (axes,) = _figure(1, width=1.6 + 1.1 * len(rows))
    dense = next(row for row in rows if row["weights"] == "dense")
    names = [f"{row['weights']}\n{row['rate']:g}" for row in rows]
    axes.bar(names, [row["seconds"] for row in rows], color=COLOURS[2], label="measured")
    bounds = [dense["seconds"] / row["bound"] for row in rows]
    axes.bar(names, bounds, color="none", edgecolor=COLOURS[0], linestyle=":", label="by operations")
    axes.set_ylabel("seconds a step")
    axes.legend(frameon=False)
    _finish(figure, path, title=title)


def draw_layers(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """A layer's milliseconds over what is kept, and its speed over dense beside the bound; a curve a model and size."""
    figure, (costs, speeds) = _figure(2, width=10.5)
    groups = sorted({(row["model"], row["tokens"]) for row in rows})
    for number, (model, tokens) in enumerate(groups):
        colour, label = COLOURS[number % len(COLOURS)], f"{model}, {tokens} tokens"
        ours = [row for row in rows if _is(row, model, tokens, "dense") or _is(row, model, tokens, "compact")]
        ours.sort(key=lambda row: row["rate"])
        rates = [row["rate"] for row in ours]
        costs.plot(rates, [1e3 * r["layer_seconds"] for r in ours], color=colour, marker="o", markersize=4, label=label)
        gathered = sorted((r["rate"], 1e3 * r["layer_seconds"]) for r in rows if _is(r, model, tokens, "gather"))
        if gathered:
            costs.plot(*zip(*gathered, strict=True), color=colour, linestyle=":", marker="x", markersize=4)
        speeds.plot(rates, [row["speed"] for row in ours], color=colour, marker="o", markersize=4)
        speeds.plot(rates, [row["bound"] for row in ours], color=FADED, linewidth=1)
    costs.set_ylabel("ms a layer and micro-batch (dotted: gathered)")
    speeds.set_ylabel("times as fast as dense (grey: by operations)")
    for axes in (costs, speeds):
        axes.set_xlabel("omission rate")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
    figure.legend(*costs.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _finish(figure, path, title=title)


def _is(row: Row, model: str, tokens: int, weights: str) -> bool:
    return (row["model"], row["tokens"], row["weights"]) == (model, tokens, weights)


def draw_ladder(runs: Mapping[str, Sequence[float]], path: Path, *, title: str) -> None:
    """Seconds of every step of each run, and what they add up to. runs: name to seconds a step."""
    figure, (single, summed) = _figure(2, width=10.5)
    for number, (name, seconds) in enumerate(runs.items()):
        colour, steps = COLOURS[number % len(COLOURS)], range(1, len(seconds) + 1)
        single.plot(steps, seconds, color=colour, linewidth=1.4, label=name)
        totals = [sum(seconds[:step]) for step in steps]
        summed.plot(steps, totals, color=colour, linewidth=1.4)
    single.set_yscale("log")
    single.set_ylabel("seconds of a step")
    summed.set_ylabel("seconds since the first step began")
    for axes in (single, summed):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    single.legend(frameon=False)
    _finish(figure, path, title=title)


def draw_reduction(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Bars of milliseconds a reduction, and how far fewer bytes alone would have brought each."""
    figure, (axes,) = _figure(1, width=1.6 + 1.0 * len(rows))
    names = [f"{row['reduction']}\n{'in turn' if row['bucketed'] else 'at once'}\n{row['rate']:g}" for row in rows]
    places = range(len(rows))
    axes.bar(places, [1e3 * row["seconds"] for row in rows], color=COLOURS[2], label="measured")
    bounds = [1e3 * row["seconds"] * row["speed"] * row["share"] for row in rows]
    axes.bar(places, bounds, color="none", edgecolor=COLOURS[0], linestyle=":", label="by bytes")
    axes.set_xticks(places, names)
    axes.set_ylabel("ms a reduction")
    axes.legend(frameon=False)
    _finish(figure, path, title=title)


def _figure(panels: int, *, width: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _finish(figure: Figure, path: Path, *, title: str) -> None:
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
