"""Pictures of `experiments.compare`, drawn from the rows of its CSV files."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments._drawing import MARKERS, MORE, PALETTE, new_figure, plain_log_ticks, write
from experiments.measures import mean_and_std

MOST_LEVEL = 7
"""With more layers than that their names are slanted, or they would run into each other."""

PLACE = ("dataset", "model", "budget_in")
"""What has pictures of its own."""

UNITS = {"params": "parameters", "flops": "FLOPs"}
"""What a budget counts, in words."""

OURS, BLACK = "gauss_newton", "#000000"
APART = 1.012
"""Methods of one budget are drawn side by side, each by this factor further to the right."""


@dataclasses.dataclass(frozen=True)
class Style:
    """How a method is drawn: ours is black and bold.

    Attributes:
      color, marker, linewidth: as matplotlib takes them.
      place: among the methods, counted from the middle one.
    """

    color: str
    marker: str
    linewidth: float
    place: float


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """A style of its own for each method, by name, whatever their order."""
    known = sorted(set(methods))
    looks = itertools.cycle(
        zip(
            (color for color in (*PALETTE, *MORE) if color != BLACK),
            (marker for marker in MARKERS if marker != "*"),
            strict=True,
        )
    )
    found = {}
    for number, method in enumerate(known):
        place = number - (len(known) - 1) / 2
        color, marker = (BLACK, "*") if method == OURS else next(looks)
        found[method] = Style(color, marker, 2.4 if method == OURS else 1.4, place)
    return found


def plot_standings(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draws test accuracy against the budget per method, from scratch beside as grown.

    Args:
      rows: as in `compare.csv`.
      path: the file to write.
    """
    places = places_of(rows)
    claims = ("from_scratch", "grown")
    figure = new_figure(9.0, 3.8 * len(places))
    grid = figure.subplots(len(places), len(claims), squeeze=False)
    known = styles(row["method"] for row in rows)
    for line, place in zip(grid, places, strict=True):
        for axes, claim in zip(line, claims, strict=True):
            mine = [row for row in rows if place_of(row) == place and row["claim"] == claim]
            for method, style in known.items():
                _draw_budgets(axes, [r for r in mine if r["method"] == method], style)
            axes.set_xscale("log")
            if mine:
                plain_log_ticks(axes, [row["budget"] for row in mine], at_values=True)
            axes.set(xlabel=f"most {UNITS[place[2]]} (methods side by side)")
            axes.set_ylabel("test accuracy (%)")
            axes.set_title(f"{place[0]}, {place[1]}: {claim.replace('_', ' ')}", fontsize=10)
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    _label_methods(figure, known)
    return write(figure, path)


def _draw_budgets(axes: Any, rows: Sequence[Mapping[str, Any]], style: Style) -> None:
    """A line over the budgets, mean and standard deviation of the seeds."""
    budgets = sorted({row["budget"] for row in rows})
    seeds = [[row for row in rows if row["budget"] == budget] for budget in budgets]
    if seeds:
        summary = np.array([mean_and_std([100 * r["test_accuracy"] for r in s]) for s in seeds])
        sizes = [budget * APART**style.place for budget in budgets]
        axes.errorbar(
            sizes, summary[:, 0], np.nan_to_num(summary[:, 1]), color=style.color,
            marker=style.marker, markersize=6, capsize=3, linewidth=style.linewidth,
        )  # fmt: skip


def _label_methods(figure: Any, known: Mapping[str, Style], dashed: str = "") -> None:
    """The legend; also of the method that is drawn dashed, from scratch."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=style.color, marker=style.marker, linewidth=style.linewidth,
               label=method)
        for method, style in known.items()
    ]  # fmt: skip
    if dashed:
        style = known[dashed]
        handles.append(
            Line2D([], [], color=style.color, linewidth=style.linewidth, linestyle="--",
                   label=f"{dashed} from scratch")
        )  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def plot_curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draws validation accuracy against training FLOPs and against seconds, means over the seeds.

    At each dataset and model's largest budget: every method as grown, and ours (the first, where
    it is not among them) from scratch, dashed.

    Args:
      rows: as in `curves.csv`.
      path: the file to write.
    """
    places = places_of(rows)
    figure = new_figure(9.0, 3.8 * len(places))
    grid = figure.subplots(len(places), 2, squeeze=False)
    methods = list(dict.fromkeys(r["method"] for r in rows if r["claim"] == "grown"))
    reference = OURS if OURS in methods else next(iter(methods), "")
    known = styles(row["method"] for row in rows)
    for line, place in zip(grid, places, strict=True):
        mine = [row for row in rows if place_of(row) == place]
        mine = [row for row in mine if row["budget"] == max(r["budget"] for r in mine)]
        arms = [(method, "grown") for method in methods]
        arms += [(reference, "from_scratch")] if methods else []
        for axes, name, unit in zip(line, ("training_flops", "seconds"), (1e12, 1.0), strict=True):
            for method, claim in arms:
                means = _mean_curve(
                    [r for r in mine if (r["method"], r["claim"]) == (method, claim)], name
                )
                if len(means):
                    axes.plot(
                        means[:, 0] / unit, 100 * means[:, 1], color=known[method].color,
                        linestyle="-" if claim == "grown" else "--",
                        linewidth=known[method].linewidth,
                    )  # fmt: skip
            axes.set(xlabel="seconds" if unit == 1.0 else "training TFLOPs")
            budget = f"at most {mine[0]['budget']:,} {UNITS[place[2]]}"
            axes.set(ylabel="validation accuracy (%)", title=f"{place[0]}, {place[1]}, {budget}")
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    _label_methods(figure, {method: known[method] for method in methods}, reference)
    return write(figure, path)


def _mean_curve(rows: Sequence[Mapping[str, Any]], cost: str) -> np.ndarray:
    """Cost and validation accuracy by epoch, means over the seeds: of epochs that all of them had.

    Searches have more epochs with one seed than with another.
    """
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["epoch"]):
        by_seed.setdefault(row["seed"], []).append((row[cost], row["val_accuracy"]))
    together = list(zip(*by_seed.values(), strict=False))
    return np.mean(together, axis=1) if together else np.empty((0, 2))


def plot_widths(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draws the widths that each method chose per layer, means over the seeds.

    At each dataset and model's largest budget.

    Args:
      rows: as in `compare.csv`.
      path: the file to write.
    """
    rows = [row for row in rows if row["claim"] in ("grown", "from_scratch")]
    places = places_of(rows)
    figure = new_figure(8.0, 3.2 * len(places))
    grid = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    known = styles(row["method"] for row in rows)
    for axes, place in zip(grid, places, strict=True):
        mine = [row for row in rows if place_of(row) == place]
        largest = max(row["budget"] for row in mine)
        mine = [row for row in mine if row["budget"] == largest]
        layers = [pair.split("=")[0] for pair in mine[0]["widths"].split()]
        for method, style in known.items():
            same = [_widths_of(row) for row in mine if row["method"] == method]
            if same:
                left = np.arange(len(layers)) + style.place * 0.8 / len(known)
                means = [np.mean([each.get(layer, 0) for each in same]) for layer in layers]
                axes.bar(left, means, 0.8 / len(known), color=style.color)
        slanted = {"rotation": 20, "ha": "right"} if len(layers) > MOST_LEVEL else {}
        axes.set_xticks(range(len(layers)), layers, **slanted)
        budget = f"at most {largest:,} {UNITS[place[2]]}"
        axes.set(ylabel="units", title=f"{place[0]}, {place[1]}, {budget}")
    _label_methods(figure, known)
    return write(figure, path)


def places_of(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = PLACE
) -> list[tuple[Any, ...]]:
    """What the rows are of, by some columns, `PLACE` before others; budgets of parameters first."""
    found = {place_of(row, columns) for row in rows}
    return sorted(found, key=lambda place: (list(UNITS).index(place[2]), place))


def place_of(row: Mapping[str, Any], columns: Sequence[str] = PLACE) -> tuple[Any, ...]:
    """Where a row belongs."""
    return tuple(row[name] for name in columns)


def _widths_of(row: Mapping[str, Any]) -> dict[str, int]:
    pairs = (pair.split("=") for pair in row["widths"].split())
    return {layer: int(units) for layer, units in pairs}
