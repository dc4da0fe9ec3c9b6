"""Trains a seed network, growing it or not, and says what came of it: what the binaries share."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

import tfgrow
from experiments import models
from experiments.datasets import Dataset
from experiments.variants import widths_of

LOSS = "sparse_categorical_crossentropy"
EVALUATION_BATCH = 256
ENDLESS = 100_000
"""Epochs of a training that its clock ends."""

OPTIMIZERS = {
    "adagrad": keras.optimizers.Adagrad,
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "lion": keras.optimizers.Lion,
    "rmsprop": keras.optimizers.RMSprop,
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
      epochs, batch_size, learning_rate: as in `model.fit`.
      optimizer: a name of `OPTIMIZERS`.
      decay: `"cosine"` (the learning rate falls to 0 over the epochs) or `"constant"`.
      seed: of everything random.
      restart: with `"cosine"`, the epoch after which the learning rate, fallen to 0, starts again;
        None is falling only once.
      fall: with `"cosine"`, without `restart`: over which share of the epochs, the last, it falls.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str = "adam"
    decay: str = "cosine"
    seed: int = 0
    restart: int | None = None
    fall: float = 1.0


@dataclasses.dataclass(frozen=True)
class Growing:
    """When and how far a network grows; see `tfgrow.GaussNewtonOracle` for what is not here.

    Attributes:
      schedule: `"every"` (each `every` epochs) or `"plateau"` (when the validation loss has not
        improved for `every` epochs).
      every: see `schedule`.
      settle: share of the epochs, at the end, in which the network only trains.
      oracle: arguments of the oracle: budget, morphisms, choice of sites...
      first: with `"every"`, the first epoch after which it may grow; `every` by default.
      rounds: events at a time, at most.
      ema_momentum: of the average of the weights at which it grows; 0 is the weights as they are.
      guard: see `tfgrow.callbacks.Growth`.
    """

    schedule: str
    every: int
    settle: float
    oracle: Mapping[str, Any]
    first: int | None = None
    rounds: int = 1
    ema_momentum: float = 0.0
    guard: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained network and how it did.

    Attributes:
      model: the network.
      history: figures by epoch, as from `model.fit`.
      seconds: wall time of the fit, validation and growth included.
      test_loss, test_accuracy: on the test split.
      events: `GrowthEvent`s, in order; empty when it was not to grow.
    """

    model: keras.Model
    history: Mapping[str, list[float]]
    seconds: float
    test_loss: float
    test_accuracy: float
    events: tuple[tfgrow.GrowthEvent, ...] = ()

    @property
    def growth_seconds(self) -> float:
        """Seconds inside growth events: learning, scoring, choosing, guard, surgery."""
        return sum(sum(event.seconds.values()) for event in self.events)


def make_repeatable(seed: int) -> None:
    """Seeds every generator and fixes the order of TensorFlow's sums: equal seeds, equal runs."""
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def seed_network(
    name: str, data: Dataset, widths: Sequence[int] | None, seed: int, augment: bool = False
) -> keras.Model:
    """A growable network of `experiments.models`, not yet compiled."""
    stock = models.build(name, data.input_shape, data.num_classes, widths, seed, augment=augment)
    return tfgrow.convert(stock)


def final_shape(
    name: str,
    data: Dataset,
    start: Sequence[int] | None,
    widths: Mapping[str, int],
    seed: int,
    augment: bool = False,
    params: int | None = None,
) -> keras.Model:
    """A network as wide as one that has grown, with weights from the layers' initializers.

    Residual streams have grown too, and no list of widths says how wide they are.

    Args:
      name: of the network it grew from.
      data: the dataset.
      start: widths of that, as for `seed_network`; it may have been pruned since.
      widths: units by site, as `open_widths` has them.
      seed: of the weights: those that a network built so wide begins with.
      augment: as for `seed_network`.
      params: of the one that has grown, if they are to be compared.

    Raises:
      ValueError: other sites, residual streams of fewer units than a new network's, or another
        number of parameters: kernels or the depth have grown too.
    """
    narrow = [1] * len(widths_of(name, start))
    model = seed_network(name, data, narrow, seed, augment)
    before = open_widths(model)
    if set(widths) != set(before) or any(widths[site] < units for site, units in before.items()):
        raise ValueError(f"'{name}' with at least the widths {before} can't have {dict(widths)}.")
    for site, units in before.items():
        if widths[site] > units:
            tfgrow.widen(model, site, widths[site] - units)
    if params not in (None, model.count_params()):
        raise ValueError(
            f"With the widths {dict(widths)} '{name}' has {model.count_params()} parameters, the "
            f"grown network {params}: not only its widths have grown."
        )
    return tfgrow.convert(keras.models.clone_model(tfgrow.strip(model)))


def params_of(name: str, data: Dataset, widths: Sequence[int]) -> int:
    """Parameters of a network of `experiments.models` of some widths."""
    stock = models.build(name, data.input_shape, data.num_classes, list(widths), seed=0)
    return int(stock.count_params())


def open_widths(model: keras.Model) -> dict[str, int]:
    """Units of every site that can grow, channels or heads, in the order of the network."""
    return {site.name: site.units for site in tfgrow.find_sites(model) if site.resizable}


def make_oracle(
    growing: Growing, seed: int, directory: str | os.PathLike[str] | None = None
) -> tfgrow.GaussNewtonOracle:
    """The oracle of a run; its project is `directory/oracle`, or in memory only."""
    place: dict[str, Any] = (
        {} if directory is None else {"directory": directory, "project_name": "oracle"}
    )
    return tfgrow.GaussNewtonOracle("val_loss", seed=seed, **growing.oracle, **place)


def make_strategy(name: str, growing: Growing, seed: int) -> Any:
    """Any growth oracle by name, in memory only; see `tfgrow.strategies.get`."""
    return tfgrow.strategies.get(name, objective="val_loss", seed=seed, **growing.oracle)


def sizes_in_logs(data: Dataset, batch_size: int) -> tfgrow.callbacks.Growth:
    """A callback that logs parameters and FLOPs, as growth does, and never grows."""
    never = Until(tfgrow.schedules.EveryNEpochs(1), last=0)
    few = data.x_train[:batch_size], data.y_train[:batch_size]
    return tfgrow.callbacks.Growth("uniform", data=few, when=never, verbose=0)


def train(
    model: keras.Model,
    data: Dataset,
    recipe: Recipe,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: bool = True,
) -> Trained:
    """Compiles the model, fits it on the training split and evaluates it on the test split.

    Args:
      model: an uncompiled network that takes the dataset's images.
      data: the dataset.
      recipe: how it is trained.
      callbacks: beside the one that prints.
      verbose: print a line per epoch.
    """
    batches = data.as_dataset("train", recipe.batch_size, seed=recipe.seed)
    model.compile(_optimizer(recipe, len(batches)), LOSS, metrics=["accuracy"])
    clock = time.perf_counter()
    history = model.fit(
        batches,
        validation_data=data.as_dataset("val", EVALUATION_BATCH),
        epochs=recipe.epochs,
        shuffle=False,  # the dataset shuffles
        callbacks=[*callbacks, *([EpochLines()] if verbose else [])],
        verbose=0,
    )
    seconds = time.perf_counter() - clock
    test = data.as_dataset("test", EVALUATION_BATCH)
    loss, accuracy = model.evaluate(test, verbose=0)
    events = [c.events for c in callbacks if isinstance(c, tfgrow.callbacks.Growth)]
    return Trained(
        model, history.history, seconds, loss, accuracy, tuple(events[0]) if events else ()
    )


def train_growing(
    model: keras.Model,
    data: Dataset,
    recipe: Recipe,
    growing: Growing,
    oracle: Any,
    journal: str | os.PathLike[str] | None = None,
    verbose: bool = True,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Trained:
    """`train`, growing: edits are learned, scored and judged on training images.

    Args:
      model: as for `train`, growable.
      data: the dataset.
      recipe: how it is trained.
      growing: when it grows.
      oracle: what proposes the edits, a growth oracle.
      journal: path of the JSON file of the events, or None.
      verbose: print a line per epoch and per event.
      callbacks: beside the growth's.
    """
    growth = tfgrow.callbacks.Growth(
        oracle,
        data=data.as_dataset("train", recipe.batch_size, seed=recipe.seed + 1),
        when=_schedule(growing, recipe.epochs),
        journal=None if journal is None else os.fspath(journal),
        verbose=2 if verbose else 0,
        rounds=growing.rounds,
        ema_momentum=growing.ema_momentum or None,
        guard=growing.guard,
    )
    return train(model, data, recipe, [growth, *callbacks], verbose)


class Until(tfgrow.schedules.Schedule):
    """Another schedule up to an epoch, so that the last growth is trained too.

    Args:
      schedule: the other.
      last: the last epoch after which the network may grow.
    """

    def __init__(self, schedule: tfgrow.schedules.Schedule, last: int) -> None:
        self.schedule = schedule
        self.last = last

    def should_grow(self, epoch: int, logs: Mapping[str, Any] | None = None) -> bool:
        return self.schedule.should_grow(epoch, logs) and epoch <= self.last

    def reset(self) -> None:
        self.schedule.reset()


class EpochLines(keras.callbacks.Callback):
    """One short line per epoch, which reads well in a log."""

    def on_epoch_begin(self, epoch, logs=None):
        self._clock = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        logs = logs or {}
        total = self.params["epochs"]
        number = f"{epoch + 1:{len(str(total))}}/{total}" if total < ENDLESS else f"{epoch + 1:3}"
        print(
            f"epoch {number}  loss {logs['loss']:.4f}  "
            f"val_loss {logs['val_loss']:.4f}  val_accuracy {logs['val_accuracy']:.4f}  "
            f"parameters {self.model.count_params():,}  {time.perf_counter() - self._clock:.1f} s",
            flush=True,
        )


def _optimizer(recipe: Recipe, steps_per_epoch: int) -> keras.optimizers.Optimizer:
    rate: Any = recipe.learning_rate
    if recipe.decay == "cosine":
        decays = keras.optimizers.schedules
        steps = max(1, (recipe.restart or recipe.epochs) * steps_per_epoch)
        if recipe.restart:
            longer = (recipe.epochs - recipe.restart) / recipe.restart
            rate = decays.CosineDecayRestarts(rate, steps, t_mul=longer)
        else:
            level = steps - max(1, round(recipe.fall * steps))
            rate = decays.CosineDecay(rate, steps - level, warmup_target=rate, warmup_steps=level)
    return OPTIMIZERS[recipe.optimizer](rate)


def _schedule(growing: Growing, epochs: int) -> Until:
    kinds = {
        "every": lambda: tfgrow.schedules.EveryNEpochs(growing.every, growing.first),
        "plateau": lambda: tfgrow.schedules.OnPlateau("val_loss", patience=growing.every),
    }
    last = math.floor((1 - growing.settle) * epochs + 1e-9)
    return Until(kinds[growing.schedule](), min(last, epochs - 1))
