"""The running average of a model's weights: where training is heading, without its noise.

At a learning rate that training can bear, the weights swing around the point they are heading for.
There, gradients are large in every layer and every new unit seems worth several times what it will
be once the weights have settled; the average of the last steps is near that point and costs nothing
(Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; Izmailov et
al., "Averaging weights leads to wider optima", arXiv 1803.05407, who also take the statistics of
BatchNormalization anew).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrow.capture.batches import batches_of
from tfgrow.graph import versions
from tfgrow.graph.nodes import trace

LOOKS = 16
"""So many times the weights are looked at while the average looks back."""


class WeightAverage:
    """An exponential moving average of the weights that a model trains.

    It begins with the plain mean of the steps so far, and anew whenever the model has grown.

    Args:
      momentum: share of the average that stays at every step, as `ema_momentum` of Keras's
        optimizers; 0.99 looks back over about 100 steps.

    Example:

    >>> import keras, numpy as np
    >>> from tfgrow.averaging import WeightAverage
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> average = WeightAverage(momentum=0.99)
    >>> for value in (1.0, 3.0):
    ...     model.set_weights([np.array([[value]])])
    ...     average.update(model)
    >>> average.assign(model)
    True
    >>> float(model.get_weights()[0].item())
    2.0
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._version: int | None = None
        self._weights: list[keras.Variable] = []
        self._values: list[tf.Tensor] = []
        self._steps = self._waiting = 0
        self._mixed: Any = None

    def update(self, model: keras.Model, steps: int = 1) -> None:
        """Takes in the weights as they are now.

        Args:
          model: the model, always the same.
          steps: how many training steps it took since the last call.
        """
        if self._version != versions.version_of(model):
            self._begin(model)
        self._waiting += steps
        # Weights of neighbouring steps are alike, and to look at all of them costs time.
        if self._waiting * (1 - self.momentum) * LOOKS < 1 and self._waiting * LOOKS < self._steps:
            return
        steps, self._waiting = self._waiting, 0
        self._steps += steps
        share = max(1 - self.momentum**steps, steps / self._steps)
        self._values = self._mixed(self._values, _read(self._weights), tf.constant(share))

    def assign(self, model: keras.Model) -> bool:
        """Gives the model the averaged weights; False if there are none of it as it is now."""
        if self._version != versions.version_of(model) or not self._steps:
            return False
        for weight, value in zip(self._weights, self._values, strict=True):
            weight.assign(value)
        return True

    def _begin(self, model: keras.Model) -> None:
        self._version = versions.version_of(model)
        self._steps = self._waiting = 0
        self._weights = list(model.trainable_variables)
        self._values = _read(self._weights)
        # One traced function would keep those of all shapes that the model ever had.
        self._mixed = tf.function(_mixed, autograph=False)


def _read(weights: Sequence[keras.Variable]) -> list[tf.Tensor]:
    return [tf.convert_to_tensor(weight.value) for weight in weights]


def _mixed(values: list, weights: list, share: Any) -> list:
    return [
        value + tf.cast(share, value.dtype) * (weight - value)
        for value, weight in zip(values, weights, strict=True)
    ]


def refresh_statistics(model: keras.Model, dataset: Any) -> None:
    """Takes the moving statistics of BatchNormalization anew: their means over some batches.

    Nothing else that changes in training mode does: states of other layers and of random numbers
    are put back. Layers that are frozen, or used more than once, keep their statistics.

    Args:
      model: a built growable model.
      dataset: some batches; anything `model.fit` takes, with targets.
    """
    layers = _normalising(model)
    if not layers:
        return
    taken: list[list[np.ndarray]] = []
    statistics = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]
    ours = {id(variable) for variable in statistics}
    others = [(v, v.numpy()) for v in model.non_trainable_variables if id(v) not in ours]
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0  # moving statistics are those of the last batch
        for x, _, _ in batches_of(dataset):
            model(x, training=True)
            taken.append([variable.numpy() for variable in statistics])
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for variable, value in others:
            variable.assign(value)
    for variable, values in zip(statistics, zip(*taken, strict=True), strict=True):
        variable.assign(np.mean(values, axis=0))


def _normalising(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    graph = trace(model)
    return [
        node.operation
        for node in graph.nodes
        if isinstance(node.operation, keras.layers.BatchNormalization)
        and node.operation.trainable
        and len(graph.calls(node.operation)) == 1
    ]
