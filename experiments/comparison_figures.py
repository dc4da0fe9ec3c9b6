"""Pictures of `experiments.compare`, drawn from the rows of its CSV files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments._drawing import MARKERS, colors, new_figure, plain_log_ticks, write
from experiments.measures import mean_and_std


def plot_standings(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draws test accuracy against parameters per method, from scratch beside as grown.

    Args:
      rows: as in `compare.csv`.
      path: the file to write.
    """
    places = sorted({(row["dataset"], row["model"]) for row in rows})
    claims = ("from_scratch", "grown")
    figure = new_figure(9.0, 3.8 * len(places))
    grid = figure.subplots(len(places), len(claims), squeeze=False)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for line, place in zip(grid, places, strict=True):
        for axes, claim in zip(line, claims, strict=True):
            mine = [
                row for row in rows
                if (row["dataset"], row["model"]) == place and row["claim"] == claim
            ]  # fmt: skip
            for number, (method, color) in enumerate(
                zip(methods, colors(len(methods)), strict=True)
            ):
                _draw_budgets(axes, [r for r in mine if r["method"] == method], color, number)
            axes.set_xscale("log")
            if mine:
                plain_log_ticks(axes, [row["params"] for row in mine])
            axes.set(xlabel="parameters", ylabel="test accuracy (%)")
            axes.set_title(f"{place[0]}, {place[1]}: {claim.replace('_', ' ')}", fontsize=10)
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    _label_methods(figure, methods)
    return write(figure, path)


def _draw_budgets(axes: Any, rows: Sequence[Mapping[str, Any]], color: Any, number: int) -> None:
    """A line over the budgets, mean and standard deviation of the seeds."""
    budgets = sorted({row["budget"] for row in rows})
    seeds = [[row for row in rows if row["budget"] == budget] for budget in budgets]
    if seeds:
        summary = np.array([mean_and_std([100 * r["test_accuracy"] for r in s]) for s in seeds])
        sizes = [np.mean([row["params"] for row in same]) for same in seeds]
        marker = MARKERS[number % len(MARKERS)]
        axes.errorbar(
            sizes, summary[:, 0], np.nan_to_num(summary[:, 1]), color=color, marker=marker,
            markersize=5, capsize=3, linewidth=1.4,
        )  # fmt: skip


def _label_methods(figure: Any, methods: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker=MARKERS[number % len(MARKERS)], label=method)
        for number, (method, color) in enumerate(zip(methods, colors(len(methods)), strict=True))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def plot_curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draws validation accuracy against training FLOPs and against seconds, means over the seeds.

    At each dataset and model's largest budget: every method as grown, and the first of them from
    scratch, dashed.

    Args:
      rows: as in `curves.csv`.
      path: the file to write.
    """
    places = sorted({(row["dataset"], row["model"]) for row in rows})
    figure = new_figure(9.0, 3.8 * len(places))
    grid = figure.subplots(len(places), 2, squeeze=False)
    methods = list(dict.fromkeys(r["method"] for r in rows if r["claim"] == "grown"))
    for line, place in zip(grid, places, strict=True):
        mine = [row for row in rows if (row["dataset"], row["model"]) == place]
        mine = [row for row in mine if row["budget"] == max(r["budget"] for r in mine)]
        arms = [(m, "grown") for m in methods] + [(methods[0], "from_scratch")] if methods else []
        for axes, name, unit in zip(line, ("training_flops", "seconds"), (1e12, 1.0), strict=True):
            for method, claim in arms:
                same = [r for r in mine if (r["method"], r["claim"]) == (method, claim)]
                epochs = sorted({row["epoch"] for row in same})
                means = [
                    np.mean([[r[name] / unit, 100 * r["val_accuracy"]]
                             for r in same if r["epoch"] == epoch], axis=0)
                    for epoch in epochs
                ]  # fmt: skip
                if means:
                    axes.plot(
                        *np.transpose(means), color=colors(len(methods))[methods.index(method)],
                        linestyle="-" if claim == "grown" else "--", linewidth=1.4,
                    )  # fmt: skip
            axes.set(xlabel="seconds" if unit == 1.0 else "training TFLOPs")
            axes.set(ylabel="validation accuracy (%)", title=f"{place[0]}, {place[1]}")
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    _label_methods(figure, methods)
    return write(figure, path)


def plot_widths(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draws the widths that each method chose per layer, means over the seeds.

    At each dataset and model's largest budget.

    Args:
      rows: as in `compare.csv`.
      path: the file to write.
    """
    rows = [row for row in rows if row["claim"] in ("grown", "from_scratch")]
    places = sorted({(row["dataset"], row["model"]) for row in rows})
    figure = new_figure(8.0, 3.2 * len(places))
    grid = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axes, place in zip(grid, places, strict=True):
        mine = [row for row in rows if (row["dataset"], row["model"]) == place]
        largest = max(row["budget"] for row in mine)
        mine = [row for row in mine if row["budget"] == largest]
        layers = [pair.split("=")[0] for pair in mine[0]["widths"].split()]
        for number, (method, color) in enumerate(zip(methods, colors(len(methods)), strict=True)):
            same = [_widths_of(row) for row in mine if row["method"] == method]
            if same:
                left = np.arange(len(layers)) + (number - (len(methods) - 1) / 2) * (
                    0.8 / len(methods)
                )
                means = [np.mean([each.get(layer, 0) for each in same]) for layer in layers]
                axes.bar(left, means, 0.8 / len(methods), color=color)
        axes.set_xticks(range(len(layers)), layers)
        axes.set(ylabel="units", title=f"{place[0]}, {place[1]}, at most {largest:,} parameters")
    _label_methods(figure, methods)
    return write(figure, path)


def _widths_of(row: Mapping[str, Any]) -> dict[str, int]:
    pairs = (pair.split("=") for pair in row["widths"].split())
    return {layer: int(units) for layer, units in pairs}
