"""The page of `experiments.headline`: what a long run has come to, finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, reports, tables
from experiments._flags import as_text
from tfgrow import GrowthEvent

LINES = 12
"""Of the table, at most: epochs spread over the run."""

COLUMNS = (
    "epoch", "hours", "parameters", "MFLOPs", "training loss", "validation loss",
    "validation accuracy",
)  # fmt: skip

RUN_COLUMNS = (
    "run", "test accuracy", "parameters", "MFLOPs", "epochs", "hours", "threads", "other settings",
)  # fmt: skip

PAGE = """# One long run: growing to at most {budget}

Made by `python -m experiments.headline` from `{source}`; don't edit by hand.

{outcome}

{table}

![Validation accuracy against hours](images/headline-accuracy.png)

![Widths, loss and parameters](images/headline-growth.png)

Settings: `{settings}`.

## All runs that have ended

{runs}
"""


def write(
    state: Mapping[str, Any],
    result: Mapping[str, Any] | None,
    kept: str | Path,
    docs: str,
    earlier: Mapping[str, Any],
) -> list[Path]:
    """Keeps the figures of a run, and writes its page and pictures.

    Args:
      state: `settings` and `epochs`, as the run keeps them.
      result: what it came to, or None as long as it is not finished.
      kept: the JSON file to keep the figures in.
      docs: the page to write.
      earlier: settings of runs that are older than the flags for these.
    """
    found = {"settings": state["settings"], "epochs": state["epochs"], "result": result}
    reports.write_json(Path(kept), found)
    epochs, images = state["epochs"], Path(docs).parent / "images"
    history = {name: [epoch[name] for epoch in epochs] for name in ("loss", "val_loss")}
    events = [GrowthEvent.from_json(event) for epoch in epochs for event in epoch["events"]]
    hours = np.cumsum([epoch["seconds"] for epoch in epochs]) / 3600
    accuracy = [epoch["val_accuracy"] for epoch in epochs]
    settings = state["settings"]
    page = PAGE.format(
        budget=f"{settings['max_params']:,} parameters",
        source=kept,
        outcome=_outcome(epochs, result, settings, hours[-1]),
        table=tables.markdown(COLUMNS, _rows(epochs, hours)),
        settings=as_text(settings),
        runs=tables.markdown(RUN_COLUMNS, list(_runs(Path(kept).parent, settings, earlier))),
    )
    return [
        figures.plot_accuracy(hours, accuracy, images / "headline-accuracy.png"),
        figures.plot_growth(events, history, images / "headline-growth.png"),
        tables.write_page(docs, page),
    ]


def _runs(
    folder: Path, settings: Mapping[str, Any], earlier: Mapping[str, Any]
) -> Iterable[list[Any]]:
    """A line per finished run of a folder: what it came to, and where its settings are others."""
    ours = set(as_text(settings).split())
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text()).get("result")
        if result is None:
            continue
        flags = as_text({**earlier, **result["settings"]}).split()
        other = [flag for flag in flags if flag not in ours]
        yield [
            path.stem,
            f"{100 * result['test_accuracy']:.2f} %",
            result["params"],
            f"{result['flops'] / 1e6:.1f}",
            result["settings"]["epochs"],
            f"{result['hours']:.1f}",
            result.get("threads", ""),
            f"`{' '.join(other)}`" if other else "",
        ]


def _outcome(
    epochs: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    hours: float,
) -> str:
    if result is None:
        return (
            f"The run is not finished: {len(epochs)} of {settings['epochs']} epochs, "
            f"{hours:.1f} hours. The test images have not been looked at."
        )
    widths = ", ".join(str(units) for units in result["widths"].values())
    return (
        f"**{100 * result['test_accuracy']:.2f} %** of the test images of {settings['dataset']}, "
        f"looked at once, with {result['params']:,} parameters (all of them dense) and "
        f"{result['flops'] / 1e6:.1f} MFLOPs per image, after {hours:.1f} hours. Widths: {widths}."
    )


def _rows(epochs: Sequence[Mapping[str, Any]], hours: np.ndarray) -> list[list[Any]]:
    shown = np.unique(np.linspace(0, len(epochs) - 1, LINES).round().astype(int))
    return [
        [
            int(i) + 1,
            f"{hours[i]:.2f}",
            epochs[i]["params"],
            f"{epochs[i]['flops'] / 1e6:.1f}",
            f"{epochs[i]['loss']:.3f}",
            f"{epochs[i]['val_loss']:.3f}",
            f"{100 * epochs[i]['val_accuracy']:.2f} %",
        ]
        for i in shown
    ]
