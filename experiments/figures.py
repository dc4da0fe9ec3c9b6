"""Pictures of a run, drawn with matplotlib; the suffix of the path (.png, .svg, .pdf) decides."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from experiments._drawing import (
    GREY,
    MARKERS,
    PALETTE,
    colors,
    new_figure,
    padded,
    plain_log_ticks,
    write,
)
from experiments.measures import agreement, mean_and_std

SMALLEST_LABELLED_SHARE = 0.045


def plot_growth(
    events: Sequence[Any],
    history: Mapping[str, Sequence[float]] | Any,
    path: str | os.PathLike[str],
    *,
    initial_widths: Mapping[str, int] | None = None,
) -> Path:
    """Draws widths, loss and parameters over the epochs of one fit, growth events marked.

    Widths are stacked, one band per site, the first site at the bottom; the labels at the right
    say `site before→after`.

    Args:
      events: the `GrowthEvent`s of the fit (`growth.events`), in order.
      history: `history.history` of `model.fit`, or the `History` itself: `loss`, `val_loss` if
        there is one, one value per epoch.
      path: the file to write.
      initial_widths: site name -> width before the fit, in the order of the network. Needed to
        show sites that never grew; by default the sites are those of the events, by name.

    Returns:
      The path written.

    Raises:
      ValueError: if the history has no `loss` or no epochs.
    """
    curves = getattr(history, "history", history)
    if not len(curves.get("loss", ())):
        raise ValueError(
            f"plot_growth needs a history with a loss per epoch; found the keys {sorted(curves)}. "
            "Pass the result of model.fit."
        )
    epochs = len(curves["loss"])
    figure = new_figure(8.0, 7.5)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.4))
    _draw_widths(top, events, epochs, initial_widths)
    for key, label, color in (("loss", "training", 0), ("val_loss", "validation", 1)):
        if key in curves:
            times = np.arange(len(curves[key])) + 1
            middle.plot(times, curves[key], color=PALETTE[color], label=label)
    middle.set_ylabel("loss")
    _draw_params(bottom, events, curves, epochs)
    bottom.set_xlabel("epoch")
    bottom.set_xlim(0, epochs)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, middle, bottom):
        _mark_events(axes, events)
    middle.legend(edgecolor="none", framealpha=1)
    return write(figure, path)


def plot_accuracy(
    hours: ArrayLike, accuracy: Sequence[float], path: str | os.PathLike[str]
) -> Path:
    """Draws validation accuracy against the hours of a training, a point per epoch.

    Args:
      hours: since the training began, at the end of each epoch.
      accuracy: then.
      path: the file to write.
    """
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    axes.plot(hours, [100 * share for share in accuracy], color=PALETTE[0], marker=".")
    axes.set(xlabel="hours", ylabel="validation accuracy (%)")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    return write(figure, path)


def plot_estimates(
    estimated: ArrayLike,
    measured: ArrayLike,
    path: str | os.PathLike[str],
    groups: Sequence[str] | None = None,
) -> Path:
    """Draws estimated against measured loss changes, with the diagonal and how well they agree.

    Args:
      estimated: estimated changes of the mean loss `[n]`.
      measured: measured changes `[n]` of the same candidates.
      path: the file to write.
      groups: a label for each point, e.g. its site; drawn in one colour each.

    Returns:
      The path written.

    Raises:
      ValueError: if the lengths differ or a value is not finite.
    """
    result = agreement(estimated, measured)
    guess, truth = np.ravel(np.asarray(estimated, float)), np.ravel(np.asarray(measured, float))
    labels = np.asarray(["candidates"] * len(guess) if groups is None else list(groups))
    if len(labels) != len(guess):
        raise ValueError(
            f"Expected one group for each of {len(guess)} points, found {len(labels)}."
        )
    figure = new_figure(5.6, 5.4)
    axes = figure.subplots()
    low, high = padded(min(guess.min(), truth.min(), 0), max(guess.max(), truth.max(), 0))
    axes.plot((low, high), (low, high), color=GREY, linewidth=1, linestyle="--", zorder=1)
    names = list(dict.fromkeys(labels.tolist()))
    for number, (name, color) in enumerate(zip(names, colors(len(names)), strict=True)):
        chosen = labels == name
        axes.scatter(
            truth[chosen],
            guess[chosen],
            26,
            color=color,
            alpha=0.8,
            label=name,
            linewidths=0,
            marker=MARKERS[number % len(MARKERS)],
            zorder=2,
        )
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.locator_params(nbins=6)  # more labels would run into each other
    axes.set(xlabel="measured change of the loss", ylabel="estimated change of the loss")
    axes.set_title(
        f"n = {result.count}   Pearson {result.pearson:.4f}   Spearman {result.spearman:.4f}\n"
        f"median relative error {result.median_relative_error:.1%}",
        fontsize=10,
    )
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=1 + len(names) // 12)
    return write(figure, path)


def plot_accuracy_params(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draws accuracy against parameters, mean ± standard deviation of each method and size.

    Args:
      rows: one mapping per trained network: `method` (a label), `params`, `accuracy` (0..1).
        Networks of one method and equal `params` are averaged (seeds).
      path: the file to write.

    Returns:
      The path written.

    Raises:
      ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("plot_accuracy_params needs at least one row, found none.")
    figure = new_figure(6.4, 4.6)
    axes = figure.subplots()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, (method, color) in enumerate(zip(methods, colors(len(methods)), strict=True)):
        readings: dict[int, list[float]] = {}
        for row in rows:
            if row["method"] == method:
                readings.setdefault(row["params"], []).append(100 * row["accuracy"])
        sizes = sorted(readings)
        summary = np.array([mean_and_std(readings[size]) for size in sizes])
        axes.errorbar(
            sizes,
            summary[:, 0],
            yerr=np.nan_to_num(summary[:, 1]),
            color=color,
            label=method,
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            capsize=3,
            linewidth=1.4,
        )
    axes.set_xscale("log")
    plain_log_ticks(axes, [row["params"] for row in rows])
    axes.set(xlabel="parameters", ylabel="test accuracy (%)")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.legend(frameon=False)
    return write(figure, path)


def plot_removal(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draws test loss and accuracy against the parameters removed, a line per method.

    Args:
      rows: one mapping per network: `method`, `removed` (percent), `loss`, `accuracy` (0..1).
        Rows with nothing removed are where every line starts.
      path: the file to write.

    Returns:
      The path written.

    Raises:
      ValueError: if there are no rows with something removed.
    """
    start = [row for row in rows if not row["removed"]]
    methods = list(dict.fromkeys(row["method"] for row in rows if row["removed"]))
    if not methods:
        raise ValueError("plot_removal needs a row with something removed, found none.")
    figure = new_figure(8.4, 4.0)
    left, right = figure.subplots(1, 2)
    for number, (method, color) in enumerate(zip(methods, colors(len(methods)), strict=True)):
        mine = start + [row for row in rows if row["method"] == method and row["removed"]]
        mine = sorted(mine, key=lambda row: row["removed"])
        removed = [row["removed"] for row in mine]
        marker = MARKERS[number % len(MARKERS)]
        left.plot(removed, [row["loss"] for row in mine], color=color, marker=marker, label=method)
        accuracy = [100 * row["accuracy"] for row in mine]
        right.plot(removed, accuracy, color=color, marker=marker)
    left.set_ylabel("test loss")
    right.set_ylabel("test accuracy (%)")
    for axes in (left, right):
        axes.set_xlabel("parameters removed (%)")
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    left.legend(frameon=False)
    return write(figure, path)


def plot_realized(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Draws what sets of edits brought, relative to the estimates, against the network's depth.

    Args:
      rows: mappings with `family`, `depth`, `epochs` (after which it was read) and `realized`; the
        mean of rows that differ in the latter only is joined by lines.
      path: the file to write.
    """
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    series = sorted({(row["family"], row["epochs"]) for row in rows})
    for number, (family, epochs) in enumerate(series):
        mine = [row for row in rows if (row["family"], row["epochs"]) == (family, epochs)]
        color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        depths = sorted({row["depth"] for row in mine})
        means = [np.mean([r["realized"] for r in mine if r["depth"] == depth]) for depth in depths]
        label = f"{family}, after {epochs} epoch{'s' if epochs > 1 else ''}"
        axes.plot(depths, means, color=color, label=label)
        axes.scatter(
            [row["depth"] for row in mine], [row["realized"] for row in mine], color=color,
            marker=marker, s=28,
        )  # fmt: skip
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xlabel("convolutions")
    axes.set_ylabel("measured / estimated change")
    axes.legend(frameon=False, fontsize=9)
    return write(figure, path)


def _draw_widths(
    axes: Any,
    events: Sequence[Any],
    epochs: int,
    initial: Mapping[str, int] | None,
) -> None:
    edges, widths = _width_steps(events, epochs, initial)
    axes.set_ylabel("units, stacked by site")
    if not widths:
        axes.text(epochs / 2, 0.5, "no site grew", ha="center", color=GREY)
    base = np.zeros(len(edges))
    total = max(sum(steps[-1] for steps in widths.values()), 1)
    for (site, steps), color in zip(widths.items(), colors(len(widths), True), strict=True):
        top = base + np.append(steps, steps[-1])
        axes.fill_between(edges, base, top, step="post", color=color, edgecolor="white", lw=0.8)
        if steps[-1] >= SMALLEST_LABELLED_SHARE * total:
            grown = f"→{steps[-1]}" if steps[-1] != steps[0] else ""
            text = f" {site} {steps[0]}{grown}"
            middle = (base[-1] + top[-1]) / 2
            axes.text(epochs, middle, text, va="center", fontsize=8.5, clip_on=False)
        base = top
    axes.set_ylim(0, base.max() * 1.02 if base.max() else 1)


def _width_steps(
    events: Sequence[Any], epochs: int, initial: Mapping[str, int] | None
) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Times `[steps + 1]` at which widths change, and each site's width `[steps]` between them."""
    applied = [event for event in events if event.status == "applied"]
    first: dict[str, int] = {}
    for event in applied:
        for site, (before, _) in event.widths.items():
            first.setdefault(site, before)
    if initial is None:
        initial = {site: first[site] for site in sorted(first, key=_natural)}
    widths = {site: [width] for site, width in {**initial, **first}.items()}
    for event in applied:
        for site, steps in widths.items():
            steps.append(event.widths.get(site, (None, steps[-1]))[1])
    edges = [0, *(event.epoch for event in applied), epochs]
    return np.asarray(edges, float), widths


def _draw_params(axes: Any, events: Sequence[Any], curves: Any, epochs: int) -> None:
    applied = [event for event in events if event.status == "applied"]
    if applied:
        times = [0, *(event.epoch for event in applied), epochs]
        params = [applied[0].params_before, *(event.params_after for event in applied)]
        axes.step(times, [*params, params[-1]], where="post", color=PALETTE[2])
    elif "tfgrow_params" in curves:
        params = curves["tfgrow_params"]
        axes.plot(np.arange(len(params)) + 1, params, color=PALETTE[2])
    axes.set_ylabel("parameters")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _mark_events(axes: Any, events: Sequence[Any]) -> None:
    """A dashed line where the network grew, a dotted one where growth was tried in vain."""
    grown = [event.epoch for event in events if event.status == "applied"]
    vain = [event.epoch for event in events if event.status != "applied"]
    for times, style, label in ((grown, "--", "growth"), (vain, ":", "no growth")):
        for number, time in enumerate(times):
            name = label if number == 0 else None
            axes.axvline(time, color=GREY, linewidth=0.8, linestyle=style, label=name)


def _natural(name: str) -> list[tuple[int, Any]]:
    """Sort key that puts `conv10` after `conv9`."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]
