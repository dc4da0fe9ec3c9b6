"""What the documented examples share: their flags, a fit that grows, one that doesn't, a table."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import app, flags

import tfgrow
from experiments import reports, tables, training
from experiments._messages import in_words, quiet_logs, stopped_cleanly

SETTINGS = (
    "max_params",
    "growth_per_step",
    "epochs",
    "every",
    "learning_rate",
    "morphisms",
    "batch_size",
    "seed",
)
SETTLE = 0.3
"""Share of the epochs, at the end, in which the network only trains."""

Data = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Inputs and labels by split: train, validation, test."""


def define_flags(values: flags.FlagValues, **defaults: Any) -> None:
    """Defines the settings of an example.

    Args:
      values: where.
      **defaults: `run`, `max_params`, `growth_per_step`, `epochs`, `every`, `learning_rate` and
        `morphisms`.
    """
    into: dict[str, Any] = {"flag_values": values}

    def number(name: str, text: str, least: float) -> None:
        define: Any = flags.DEFINE_integer if isinstance(least, int) else flags.DEFINE_float
        define(name, defaults[name], text, lower_bound=least, **into)

    number("max_params", "Budget in parameters.", 1)
    number("growth_per_step", "Most parameters a step adds, relative to those before.", 1e-6)
    number("epochs", "Epochs.", 2)
    number("every", "Grow every so many epochs.", 1)
    number("learning_rate", "Learning rate at the start.", 1e-9)
    flags.DEFINE_list("morphisms", defaults["morphisms"], "Kinds of edits to consider.", **into)
    flags.DEFINE_integer("batch_size", 64, "Samples per training step.", lower_bound=1, **into)
    flags.DEFINE_integer("seed", 0, "Seed of everything random.", 0, 2**31 - 1, **into)
    flags.DEFINE_string("output_dir", "saved_models", "Where runs are written.", **into)
    flags.DEFINE_string("run", defaults["run"], "Name of the run's folder.", **into)
    flags.DEFINE_bool("overwrite", False, "Replace a run of the same name.", **into)


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A network after its fit, and how it did on the test split."""

    model: keras.Model
    accuracy: float
    loss: float
    seconds: float
    events: tuple[tfgrow.GrowthEvent, ...] = ()


def fit(
    model: keras.Model,
    data: Data,
    values: flags.FlagValues,
    growth: tfgrow.callbacks.Growth | None = None,
) -> Fitted:
    """Trains as the flags say, growing or not, and evaluates on the test split."""
    steps = values.epochs * math.ceil(len(data["train"][0]) / values.batch_size)
    rate = keras.optimizers.schedules.CosineDecay(values.learning_rate, steps)
    model.compile(
        keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    clock = time.perf_counter()
    model.fit(
        *data["train"],
        validation_data=data["validation"],
        batch_size=values.batch_size,
        epochs=values.epochs,
        callbacks=[growth, training.EpochLines()] if growth else [],
        verbose=0,
    )
    seconds = time.perf_counter() - clock
    loss, accuracy = model.evaluate(*data["test"], verbose=0)
    return Fitted(model, accuracy, loss, seconds, tuple(growth.events) if growth else ())


def growth_of(data: Data, values: flags.FlagValues, journal: Path) -> tfgrow.callbacks.Growth:
    """The callback that grows a network as the flags say, on the training split."""
    oracle = tfgrow.GaussNewtonOracle(
        morphisms=values.morphisms,
        max_params=values.max_params,
        growth_per_step=values.growth_per_step,
        seed=values.seed,
    )
    last = max(1, math.floor((1 - SETTLE) * values.epochs))
    when = training.Until(tfgrow.schedules.EveryNEpochs(values.every), last)
    return tfgrow.callbacks.Growth(
        oracle, data=data["train"], when=when, journal=str(journal), verbose=2
    )


def run(
    values: flags.FlagValues,
    build: Callable[[], keras.Model],
    data: Data,
    texts: Mapping[str, str] | None = None,
) -> tuple[Fitted, Fitted]:
    """Trains a network without growing it, then growing; writes the folder and prints the table.

    Args:
      values: the settings.
      build: makes the seed network, of stock layers or growable ones.
      data: what it learns.
      texts: what else the folder is to hold, by file name.

    Returns:
      The network that did not grow, and the one that did.
    """
    target = reports.check_free(os.path.join(values.output_dir, values.run), values.overwrite)
    with reports.run_directory(target) as directory:
        seed = fit(_seeded(build, values.seed), data, values)
        growth = growth_of(data, values, directory / "journal.json")
        grown = fit(_seeded(build, values.seed), data, values, growth)
        tfgrow.strip(grown.model).save(directory / "model.keras")
        tfgrow.export(grown.model, directory / reports.VERSION, verbose=False)
        for name, text in (texts or {}).items():
            (directory / name).write_text(text + "\n")
        reports.write_json(directory / reports.CONFIG, {n: values[n].value for n in SETTINGS})
    print()
    tables.show(COLUMNS, [_cells("seed, not grown", seed), _cells("grown", grown)])
    print(f"\nWritten to {os.path.relpath(target)}/")
    return seed, grown


def main_of(program: str, run: Callable[[flags.FlagValues], Any]) -> Callable[[list[str]], None]:
    """The `main` of an example: its errors and interruptions come as one line."""

    def main(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"Unexpected arguments {arguments[1:]}; settings are --flags.")
        quiet_logs()
        with stopped_cleanly(program), in_words(program):
            run(flags.FLAGS)

    return main


def _seeded(build: Callable[[], keras.Model], seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return tfgrow.convert(build())


COLUMNS = ("network", "widths", "parameters", "test accuracy", "test loss", "seconds", "growth")


def _cells(name: str, fitted: Fitted) -> list[Any]:
    widths = reports.shape_text(training.open_widths(fitted.model))
    growth = sum(sum(event.seconds.values()) for event in fitted.events)
    return [
        name,
        widths,
        fitted.model.count_params(),
        f"{100 * fitted.accuracy:.1f} %",
        f"{fitted.loss:.3f}",
        f"{fitted.seconds:.0f}",
        f"{growth:.0f} s",
    ]
