"""What the figures share: colours, canvas, axes.

Colours are told apart by readers with any colour vision: Okabe and Ito's palette for a few
series, a sequential map for many layers in order; markers differ as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments._extras import require

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MORE = ("#999999", "#8B4513", "#C5B800")
"""Colours for a few series more."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
GREY = "#666666"


def colors(count: int, in_order: bool = False) -> list[Any]:
    """As many colours: the palette for a few series, a sequential map for many or ordered ones."""
    if count <= len(PALETTE) and not in_order:
        return list(PALETTE[:count])
    colormaps = require("matplotlib", "Drawing figures").colormaps
    return list(colormaps["viridis"](np.linspace(0.05, 0.93, max(count, 2))))[:count]


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this many inches."""
    # Figure, not pyplot: no display, no global state, nothing to close.
    figure = require("matplotlib.figure", "Drawing figures").Figure
    return figure(figsize=(width, height), layout="constrained", dpi=140)


def write(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Saves the figure, without top and right spines, and returns the path."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def padded(low: float, high: float) -> tuple[float, float]:
    """The interval with a margin of 4 % on both sides, never empty."""
    margin = 0.04 * (high - low) or 1e-6
    return low - margin, high + margin


def plain_log_ticks(axes: Any, values: Sequence[float], at_values: bool = False) -> None:
    """Ticks like 5k, 10k, 20k: fewer than a decade of a log axis is otherwise left bare."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    axes.set_xlim(min(values) / 1.25, max(values) * 1.25)
    locator = FixedLocator(sorted(set(values))) if at_values else LogLocator(subs=(1, 2, 5))
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: _rounded(value))


def _rounded(value: float) -> str:
    """A large number in thousands or millions."""
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"
