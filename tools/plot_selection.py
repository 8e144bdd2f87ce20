#!/usr/bin/env python3
"""Draw which neurons a sparse run kept, and how often: heat maps of layers x heads and of layers x channels.

Reads the visits file that the trainer leaves with the run; writes a PNG, unless its name says otherwise.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_sat.log import say
from megatron_sat.training.visits import KINDS, Visits, load_visits

MAX_COLUMNS = 512
"""Columns of the picture; more neurons share one, which shows their mean."""
_UNITS = {"attention": "head or query group", "mlp": "channel"}


def binned(shares: np.ndarray, columns: int) -> np.ndarray:
    """[layers, units] -> [layers, at most ``columns``]: means of neighbours, in equal parts but for one."""
    parts = np.array_split(shares, min(columns, shares.shape[1]), axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1)


def draw(visits: Visits) -> Figure:
    """The heat maps, one below the other; colour is the share of steps in which a neuron took part."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(len(KINDS), 1)
    for kind, ax in zip(KINDS, axes, strict=True):
        _heat_map(ax, visits.shares(kind), layers=visits.layers(kind), kind=kind)
    figure.colorbar(axes[0].images[0], ax=list(axes), label=f"kept, share of {visits.steps:,} steps")
    return figure


def _heat_map(ax: Axes, shares: np.ndarray, *, layers: Sequence[int], kind: str) -> None:
    layer_count, units = shares.shape
    extent = (-0.5, units - 0.5, layer_count - 0.5, -0.5)
    image = binned(shares, MAX_COLUMNS)
    ax.imshow(image, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    shown = range(0, layer_count, max(1, layer_count // 16))
    ax.set_yticks(list(shown), [str(layers[row]) for row in shown])
    ax.set(title=describe(shares, kind=kind), xlabel=_UNITS[kind], ylabel="layer")


def describe(shares: np.ndarray, *, kind: str) -> str:
    """One line: how unevenly the units of a kind were kept."""
    size = f"{shares.shape[0]} layers of {shares.shape[1]:,} units"
    spread = f"kept in {shares.min():.1%} to {shares.max():.1%} of the steps, mean {shares.mean():.1%}"
    return f"{kind}: {size}, {spread}, {(shares == 0).sum():,} never"


def main(argv: Sequence[str]) -> None:
    """Draw the picture that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("visits", help="the visits file (.npz) of a run")
    parser.add_argument("--output", help="the picture to write (default: beside the file, .png)")
    args = parser.parse_args(argv)
    visits = load_visits(args.visits)
    figure = draw(visits)
    picture = Path(args.output or Path(args.visits).with_suffix(".png"))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    for kind in KINDS:
        say(describe(visits.shares(kind), kind=kind))
    say(f"wrote {picture}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"plot_selection.py: {error}")
