"""Widths by search instead of growth: Keras Tuner's Hyperband, for as long as growing takes.

What one would do without growing. A trial's widths are those of the seed network times a factor per
layer, drawn evenly on a logarithmic scale, all scaled alike to fill the budget: no trial is wasted
on networks that are too small.

Source: Li et al. 2018, "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization".
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import keras
import keras_tuner

from experiments import training
from experiments.datasets import Dataset
from experiments.variants import widths_of

MOST = 4.0
"""A layer's factor lies between the inverse of this and this."""

OBJECTIVE = keras_tuner.Objective("val_accuracy", "max")


class UntilTimeIsUp(keras_tuner.oracles.HyperbandOracle):
    """Hyperband that begins no trial after `deadline`, a time of `time.perf_counter`."""

    deadline = float("inf")

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        if time.perf_counter() >= self.deadline and self.end_order:
            return {"status": "STOPPED"}
        return super().populate_space(trial_id)


class Search(keras_tuner.Hyperband):
    """Keras Tuner's Hyperband with an oracle of one's own."""

    def __init__(self, oracle: UntilTimeIsUp, hypermodel: Any, **kwargs: Any) -> None:
        super(keras_tuner.Hyperband, self).__init__(oracle, hypermodel=hypermodel, **kwargs)


class Record(keras.callbacks.Callback):
    """Every epoch of all trials; stops the one that runs when the time is up.

    Attributes:
      seconds: of each epoch, with what lies before it.
      flops: inference FLOPs per image of the network it was of.
      best: highest validation accuracy so far.
      flops_of_best: of the network that had it.
    """

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self.deadline = deadline
        self.seconds: list[float] = []
        self.flops: list[float] = []
        self.best: list[float] = []
        self.flops_of_best: list[float] = []
        self._last = time.perf_counter()

    def __deepcopy__(self, memo: Any) -> Record:
        """The same for all trials, of which the tuner gives each a copy."""
        return self

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if time.perf_counter() >= self.deadline:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        self.flops.append(logs["tfgrow_flops"])
        better = not self.best or logs["val_accuracy"] > self.best[-1]
        self.best.append(logs["val_accuracy"] if better else self.best[-1])
        self.flops_of_best.append(self.flops[-1] if better else self.flops_of_best[-1])


class Widths:
    """Builds compiled networks that fill a budget, from a factor per layer."""

    def __init__(
        self,
        name: str,
        data: Dataset,
        widths: Sequence[int] | None,
        budget: int,
        recipe: training.Recipe,
        augment: bool = False,
    ) -> None:
        self._name, self._data, self._augment = name, data, augment
        self._seed_widths = widths_of(name, widths)
        self._budget, self._recipe = budget, recipe

    def __call__(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        """The network of a trial."""
        model = self._network(self.of(hp))
        optimizer = training.OPTIMIZERS[self._recipe.optimizer](self._recipe.learning_rate)
        model.compile(optimizer, training.LOSS, metrics=["accuracy"])
        return model

    def of(self, hp: keras_tuner.HyperParameters) -> list[int]:
        """The widths of a trial: the largest of its shape within the budget."""
        shape = [
            units * hp.Float(f"factor_{number}", 1 / MOST, MOST, sampling="log")
            for number, units in enumerate(self._seed_widths)
        ]

        def scaled(size: float) -> list[int]:
            return [max(1, int(size * units)) for units in shape]

        low, high = 0.0, 1.0
        while self._params(scaled(high)) <= self._budget:
            high *= 2
        for _ in range(12):
            middle = (low + high) / 2
            fits = self._params(scaled(middle)) <= self._budget
            low, high = (middle, high) if fits else (low, middle)
        return scaled(low)

    def _network(self, widths: Sequence[int]) -> keras.Model:
        return training.seed_network(
            self._name, self._data, widths, self._recipe.seed, self._augment
        )

    def _params(self, widths: Sequence[int]) -> int:
        return training.params_of(self._name, self._data, widths)


def search(
    build: Widths, data: Dataset, recipe: training.Recipe, seconds: float
) -> tuple[training.Trained, list[float]]:
    """The best network that Hyperband finds and trains in some time.

    Args:
      build: of the networks.
      data: what they are trained, validated and finally tested on.
      recipe: its epochs are the most of any trial; its learning rate does not fall.
      seconds: after these no trial begins, and the one that runs ends.

    Returns:
      The network, whose history is that of all trials' epochs, and the seconds of each epoch.
    """
    deadline = time.perf_counter() + seconds
    oracle = UntilTimeIsUp(
        OBJECTIVE, max_epochs=recipe.epochs, hyperband_iterations=1000, seed=recipe.seed
    )
    oracle.deadline = deadline
    record = Record(deadline)
    with tempfile.TemporaryDirectory() as folder:
        tuner = Search(oracle, build, directory=folder, project_name="search")
        tuner.search(
            data.as_dataset("train", recipe.batch_size, seed=recipe.seed),
            validation_data=data.as_dataset("val", training.EVALUATION_BATCH),
            callbacks=[training.sizes_in_logs(data, recipe.batch_size), record],
            shuffle=False,  # the dataset shuffles
            verbose=0,
        )
        (model,) = tuner.get_best_models(1)
    loss, accuracy = model.evaluate(data.as_dataset("test", training.EVALUATION_BATCH), verbose=0)
    history = {
        "tfgrow_flops": record.flops,
        "val_accuracy": record.best,
        "flops_of_best": record.flops_of_best,
    }
    took = sum(record.seconds)
    return training.Trained(model, history, took, loss, accuracy), record.seconds
