"""Cells: each done once, in a process of its own, kept in a file; those of `experiments.pays`.

What a cell of any experiment starts and ends with is `begin` and `finish`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

ARMS = ("grown", "same_epochs", "same_time")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training: what it is, and everything that decides its outcome.

    Attributes:
      arm: what is trained, a name of the experiment's.
      seed: of the network, the split of the data and everything else random.
      settings: the flags.
    """

    arm: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The cell's file."""
        folder = f"{self.settings['dataset'].replace('/', '-')}-{self.settings['model']}"
        name = f"{self.arm}-seed{self.seed}.json"
        return Path(self.settings["results_dir"]) / folder / name

    @property
    def key(self) -> dict[str, Any]:
        """The settings that a finished cell must agree with to count."""
        places = ("data_dir", "results_dir", "seeds")
        return {name: value for name, value in self.settings.items() if name not in places}


class Kept(Protocol):
    """What is done once and kept in a file."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def key(self) -> Mapping[str, Any]:
        """The settings that the file must agree with to count."""


class Seeded(Protocol):
    """What a cell of any experiment says of how it begins."""

    @property
    def seed(self) -> int:
        """Of the network, the split of the data and everything else random."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The flags: `dataset`, `data_dir`, `threads`, and `max_train` if it is limited."""


def load(cell: Kept) -> dict[str, Any] | None:
    """The result of a finished cell, or None.

    Raises:
      ValueError: the file is of a run with other settings.
    """
    if not cell.path.exists():
        return None
    found = json.loads(cell.path.read_text())
    differ = {
        name: (found["settings"].get(name), value)
        for name, value in cell.key.items()
        if found["settings"].get(name) != value
    }
    if differ:
        raise ValueError(
            f"'{cell.path}' was made with other settings (found, wanted): {differ}. Choose "
            "another folder for results, or remove the file."
        )
    return found


def run_cell(cell: Cell, grown: Mapping[str, Any] | None) -> dict[str, Any]:
    """Trains one cell and writes its file; meant for a fresh process.

    Args:
      cell: which.
      grown: the result of the seed's `grown` cell; None for that cell itself.
    """
    data = begin(cell)
    trained, epochs = _grow(cell, data) if grown is None else _from_scratch(cell, data, grown)
    return finish(cell, trained, epochs)


def begin(cell: Seeded) -> Any:
    """Fixes threads and seeds of this process, which should be fresh, and loads the cell's data."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(cell.settings["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(1)
    from experiments import datasets, training

    training.make_repeatable(cell.seed)
    return datasets.load(
        cell.settings["dataset"],
        cell.settings["data_dir"],
        seed=cell.seed,
        max_train=cell.settings.get("max_train"),
    )


def finish(cell: Cell, trained: Any, epochs: int) -> dict[str, Any]:
    """Writes the cell's file, and returns what is in it."""
    from experiments import reports, training

    result = {
        "arm": cell.arm,
        "seed": cell.seed,
        "settings": cell.key,
        "epochs": epochs,
        "widths": training.open_widths(trained.model),
        "params": trained.model.count_params(),
        "test_accuracy": trained.test_accuracy,
        "test_loss": trained.test_loss,
        "seconds": trained.seconds,
        "growth_seconds": trained.growth_seconds,
        "events": [event.to_json() for event in trained.events],
        "history": trained.history,
    }
    reports.write_json(cell.path, result)
    return result


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a new process: nothing of one cell is left in memory for the next."""
    context = _fresh_context()
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
        return pool.submit(work, *arguments).result()


@functools.cache
def _fresh_context() -> Any:
    """New processes come of one that has imported what takes seconds, where the system has such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tfgrow"])
    return context


def _end_with_parent() -> None:
    """Of a run that is killed, no process goes on and keeps the machine busy."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def recipe_of(cell: Seeded, epochs: int) -> Any:
    """How a cell is trained for so many epochs."""
    from experiments import training

    names = ("batch_size", "learning_rate", "optimizer", "fall")
    chosen = {name: cell.settings[name] for name in names if name in cell.settings}
    return training.Recipe(epochs=epochs, seed=cell.seed, **chosen)


def _grow(cell: Cell, data: Any) -> tuple[Any, int]:
    from experiments import training

    settings, epochs = cell.settings, cell.settings["epochs"]
    names = ("max_params", "growth_per_step", "morphisms", "new_units", "curvature", "score")
    oracle = {name: settings[name] for name in names}
    growing = training.Growing("every", settings["every"], settings["settle"], oracle)
    trained = training.train_growing(
        training.seed_network(
            settings["model"], data, settings["widths"], cell.seed, settings["augment"]
        ),
        data,
        recipe_of(cell, epochs),
        growing,
        training.make_oracle(growing, cell.seed),
    )
    return trained, epochs


def _from_scratch(cell: Cell, data: Any, grown: Mapping[str, Any]) -> tuple[Any, int]:
    from experiments import training

    settings = cell.settings
    model = training.final_shape(
        settings["model"], data, settings["widths"], grown["widths"], cell.seed,
        settings["augment"], grown["params"],
    )  # fmt: skip
    if cell.arm == "same_epochs":
        return training.train(model, data, recipe_of(cell, grown["epochs"])), grown["epochs"]
    clock = until_time_is_up(grown["seconds"], cell.settings["learning_rate"])
    recipe = dataclasses.replace(recipe_of(cell, training.ENDLESS), decay="constant")
    trained = training.train(model, data, recipe, [clock])
    return trained, len(trained.history["loss"])


def until_time_is_up(seconds: float, learning_rate: float, fall: float = 1.0) -> Any:
    """A callback that stops a fit after so many seconds, the learning rate falling to 0 by then.

    It falls over the share `fall` of them, at the end.

    By the clock, not by a number of epochs guessed beforehand: how long an epoch takes varies.
    """
    import keras

    class Clock(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self._started = time.perf_counter()

        def on_train_batch_begin(self, batch, logs=None):
            share = min(1.0, (time.perf_counter() - self._started) / seconds)
            share = max(0.0, (share - (1 - fall)) / fall)
            rate = learning_rate * 0.5 * (1 + math.cos(math.pi * share))
            self.model.optimizer.learning_rate = rate

        def on_train_batch_end(self, batch, logs=None):
            if time.perf_counter() - self._started >= seconds:
                self.model.stop_training = True

    return Clock()
