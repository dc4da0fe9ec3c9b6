"""Really expanded networks: the truth that estimates are held against, and its price.

Every network here ends in class probabilities and is judged by the crossentropy of integer labels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

import tfgrow

BATCH_SIZE = 256

Arrays = tuple[np.ndarray, np.ndarray]


class Loss:
    """Mean loss of a model in inference mode, traced once; follows the model's weights.

    Args:
      model: any built model that gives class probabilities.
      data: `(x, y)` arrays.
    """

    def __init__(self, model: keras.Model, data: Arrays):
        self.model = model
        self._batches = batches(data)
        self._count = len(data[1])

        @tf.function(reduce_retracing=True, autograph=False)
        def batch_sum(x, y):
            losses = keras.losses.sparse_categorical_crossentropy(y, model(x, training=False))
            # Changes of a thousandth of the loss are compared: sums of float32 would blur them.
            return tf.reduce_sum(tf.cast(losses, tf.float64))

        self._batch_sum = batch_sum

    def __call__(self) -> float:
        return sum(float(self._batch_sum(x, y)) for x, y in self._batches) / self._count


def batches(data: Arrays, size: int = BATCH_SIZE) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Arrays as batches in memory, in their order."""
    x, y = data
    return [
        (tf.constant(x[start : start + size]), tf.constant(y[start : start + size]))
        for start in range(0, len(y), size)
    ]


def expand(model: keras.Model, candidates: Sequence[tfgrow.Candidate]) -> keras.Model:
    """A copy of a growable model, uncompiled, to which the candidates are really applied."""
    # Sharing the layers but not the compiled state: no optimizer slots are copied.
    copy = tfgrow.convert(keras.Model(model.inputs, model.outputs))
    sites = {site.name: site for site in tfgrow.find_sites(copy)}
    tfgrow.apply(copy, [c.replace(site=sites[c.site.name]) for c in candidates])
    return copy


def true_changes(
    model: keras.Model,
    candidates: Sequence[tfgrow.Candidate],
    data: Arrays,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """What `tfgrow.measure_change` says of each candidate alone, `[n]`, at a fraction of its time.

    Most expansions of one site have the same weights in the same layers: the first one's network is
    traced, and takes the weights of the others in turn.

    Args:
      model: the growable model, left untouched.
      candidates: learned ones of it, of any kind; those of a site and kind stand together.
      data: `(x, y)` arrays.
      progress: called with (candidates done, candidates in all).
    """
    before = Loss(model, data)()
    changes, loss = np.empty(len(candidates)), None
    for number, candidate in enumerate(candidates):
        grown = expand(model, [candidate])
        # What else a site's edits may differ in shows there: new layers are named by their places.
        if loss is None or _form(grown) != _form(loss.model):
            loss = Loss(grown, data)
            gc.collect()  # models are cycles: the last one's would pile up
        else:
            loss.model.set_weights(grown.get_weights())
        changes[number] = loss() - before
        if progress is not None:
            progress(number + 1, len(candidates))
    return changes


def _form(model: keras.Model) -> list[tuple[str, tuple[int, ...]]]:
    """Where the weights of a model are, and their shapes."""
    return [(weight.path, tuple(weight.shape)) for weight in model.weights]
