"""The cells of `experiments.compare`: one training each, in a process of its own, kept in a file.

Of every method, budget and seed there are up to four:

* `grown`: from the seed network to the budget, while it trains;
* `from_scratch`: the widths that were found, trained from the start by the same recipe;
* `same_flops`, `same_time`: the same, for as many FLOPs, or seconds, as `grown` took.

The method `template` does not grow: its widths are those of the seed network, all scaled alike.
Nor does `hyperband`: its `grown` cell is a search over widths that takes as many seconds as
`gauss_newton` took to grow, see `experiments.searched`.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.cells import begin, recipe_of, until_time_is_up
from experiments.variants import widths_of

GROWN, FROM_SCRATCH, SAME_FLOPS, SAME_TIME = "grown", "from_scratch", "same_flops", "same_time"
CLAIMS = (GROWN, FROM_SCRATCH, SAME_FLOPS, SAME_TIME)
TEMPLATE = "template"
SEARCH = "hyperband"
CLOCKED = "gauss_newton"
"""The method that `SEARCH` takes as long as."""

PARAMS, FLOPS = "params", "flops"
"""What a budget counts."""

BACKWARD = 3
"""A training step costs three forward passes: one forward, about two backward."""

OWN_SETTINGS = {"gauss_newton": ("morphisms", "new_units", "curvature", "score", "cost_exponent")}
"""Flags that only some strategies take, beside the budget and `growth_per_step`."""

CHANGES = ("learn_steps", "score_batches", "joint", "cross_fitted")
"""What else a variant of gauss_newton may differ in; see `experiments.ablated`."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training of the comparison, and everything that decides its outcome.

    Attributes:
      dataset, model: names, see `experiments.datasets` and `experiments.models`.
      budget: most parameters, or FLOPs if `common` says so by `budget_in`.
      method: a name of `tfgrow.strategies`, or `"template"`, or any name if `common` says by
        `strategy` what it stands for.
      claim: one of `CLAIMS`.
      seed: of the network, the split of the data and everything else random.
      common: the flags that all cells share.
    """

    dataset: str
    model: str
    budget: int
    method: str
    claim: str
    seed: int
    common: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by flag."""
        return {**self.common, "dataset": self.dataset, "model": self.model}

    @property
    def strategy(self) -> str:
        """The name of the method among `tfgrow.strategies`."""
        return str(self.common.get("strategy", self.method))

    @property
    def limit(self) -> dict[str, int]:
        """The budget as growth oracles take it."""
        return {f"max_{self.common['budget_in']}": self.budget}

    @property
    def path(self) -> Path:
        """The cell's file."""
        unit = "flops" if self.common["budget_in"] == FLOPS else ""
        folder = f"{self.dataset.replace('/', '-')}-{self.model}-{self.budget}{unit}"
        name = f"{self.method}-{self.claim}-seed{self.seed}.json"
        return Path(self.common["results_dir"]) / "cells" / folder / name

    @property
    def key(self) -> dict[str, Any]:
        """The settings that a finished cell must agree with to count."""
        places = ("data_dir", "results_dir", "threads", "budget_in")
        own = {name for names in OWN_SETTINGS.values() for name in names}
        own -= set(OWN_SETTINGS.get(self.strategy, ()))
        left_out = {*places, *own}
        found = {name: value for name, value in self.common.items() if name not in left_out}
        return found | {"widths": widths_of(self.model, self.common["widths"])}


def run_cell(cell: Cell, grown: Mapping[str, Any] | None) -> dict[str, Any]:
    """Trains one cell and writes its file; meant for a fresh process.

    Args:
      cell: which.
      grown: what the `grown` cell of the same method, budget and seed came to; None for that cell
        itself and for the template. For a search, what that of `CLOCKED` came to.
    """
    data = begin(cell)
    from experiments.reports import write_json

    clock = Clock()
    if cell.claim == GROWN and cell.method == SEARCH:
        assert grown is not None
        trained = _search(cell, data, clock, grown["seconds"])
    elif cell.claim == GROWN:
        trained = _grow(cell, data, clock)
    else:
        widths = _template(cell, data) if grown is None else grown["widths"]
        trained = _from_scratch(cell, data, widths, grown, clock)
    result = _outcome(cell, trained, clock, len(data.x_train))
    write_json(cell.path, result)
    return result


def _outcome(cell: Cell, trained: Any, clock: Any, samples: int) -> dict[str, Any]:
    from experiments import training

    flops = [int(each) for each in trained.history["tfgrow_flops"]]
    training_flops = [BACKWARD * samples * each for each in flops]
    alive = [event.newborn_alive for event in trained.events if event.newborn]
    known = [share for share in alive if share is not None]
    return {
        "dataset": cell.dataset,
        "model": cell.model,
        "budget": cell.budget,
        "budget_in": cell.common["budget_in"],
        "method": cell.method,
        "claim": cell.claim,
        "seed": cell.seed,
        "settings": cell.key,
        "widths": training.open_widths(trained.model),
        "params": trained.model.count_params(),
        "flops": int(trained.history.get("flops_of_best", flops)[-1]),
        "epochs": len(flops),
        "val_accuracy": trained.history["val_accuracy"][-1],
        "test_accuracy": trained.test_accuracy,
        "test_loss": trained.test_loss,
        "training_flops": sum(training_flops),
        "seconds": trained.seconds,
        "growth_seconds": trained.growth_seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "newborn_alive": sum(known) / len(known) if known else None,
        "by_epoch": {
            "val_accuracy": trained.history["val_accuracy"],
            "flops": training_flops,
            "seconds": clock.seconds,
        },
        "events": [event.to_json() for event in trained.events],
    }


def _grow(cell: Cell, data: Any, clock: Any) -> Any:
    from experiments import training

    settings = cell.settings
    shared = {**cell.limit, "growth_per_step": settings["growth_per_step"]}
    own = {name: settings[name] for name in OWN_SETTINGS.get(cell.strategy, ())}
    changes = {name: settings[name] for name in CHANGES if name in settings}
    growing = training.Growing(
        settings.get("schedule", "every"),
        settings["every"],
        settings["settle"],
        {**shared, **own, **changes},
        rounds=settings["rounds"],
        ema_momentum=settings["ema_momentum"],
        guard=settings.get("guard", True),
    )
    make = training.make_strategy
    if changes:
        from experiments.ablated import make
    return training.train_growing(
        training.seed_network(
            cell.model, data, settings["widths"], cell.seed, settings["augment"]
        ),
        data,
        recipe_of(cell, settings["epochs"]),
        growing,
        make(cell.strategy, growing, cell.seed),
        callbacks=[clock.callback()],
    )  # fmt: skip


def _search(cell: Cell, data: Any, clock: Any, seconds: float) -> Any:
    from experiments import searched

    recipe, settings = recipe_of(cell, cell.settings["epochs"]), cell.settings
    build = searched.Widths(
        cell.model, data, settings["widths"], cell.budget, recipe, settings["augment"]
    )
    trained, clock.seconds = searched.search(build, data, recipe, seconds)
    return trained


def _from_scratch(
    cell: Cell, data: Any, widths: Mapping[str, int], grown: Mapping[str, Any] | None, clock: Any
) -> Any:
    from experiments import training

    settings = cell.settings
    model = training.final_shape(
        cell.model, data, settings["widths"], widths, cell.seed, settings["augment"],
        None if grown is None else grown["params"],
    )  # fmt: skip
    callbacks = [clock.callback(), training.sizes_in_logs(data, settings["batch_size"])]
    recipe = recipe_of(cell, settings["epochs"])
    if cell.claim == SAME_FLOPS:
        assert grown is not None
        per_epoch = BACKWARD * len(data.x_train) * grown["flops"]
        recipe = recipe_of(cell, max(1, round(grown["training_flops"] / per_epoch)))
    elif cell.claim == SAME_TIME:
        assert grown is not None
        rate, fall = settings["learning_rate"], settings["fall"]
        callbacks.append(until_time_is_up(grown["seconds"], rate, fall))
        recipe = dataclasses.replace(recipe_of(cell, training.ENDLESS), decay="constant")
    return training.train(model, data, recipe, callbacks)


def _template(cell: Cell, data: Any) -> dict[str, int]:
    """The seed network's widths times the largest factor that the budget allows, by site."""
    import tfgrow
    from experiments import training

    model = training.seed_network(cell.model, data, cell.common["widths"], cell.seed)
    model.compile("sgd", training.LOSS)
    oracle = tfgrow.strategies.Uniform(**cell.limit, growth_per_step=None, seed=cell.seed)
    few = data.x_train[:256], data.y_train[:256]
    wider = oracle.propose_plan(model, few).widths
    widths = training.open_widths(model)
    return {name: wider.get(name, (units, units))[1] for name, units in widths.items()}


class Clock:
    """The wall time of every epoch of a fit, validation and growth included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def callback(self) -> Any:
        """The Keras callback that fills `seconds`."""
        import keras

        def start(logs: Any = None) -> None:
            self._last = time.perf_counter()

        def note(epoch: int, logs: Any = None) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self._last)
            self._last = now

        return keras.callbacks.LambdaCallback(on_train_begin=start, on_epoch_end=note)
