"""The usual importances of units, by which pruning removes the least important ones.

Each is a function of `(model, data)` that gives an array `[units]` per site that can change width.
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

import tfgrow
from experiments.expanded import Arrays, batches

Importance = Mapping[str, np.ndarray]


def magnitude(model: keras.Model, data: Arrays) -> Importance:
    """L2 norm of a unit's incoming weights (Li et al. 2017 take L1, Han et al. 2015 both)."""
    del data
    found = {}
    for site in _sites(model):
        kernel = np.asarray(site.producer.kernel)
        found[site.name] = np.linalg.norm(kernel.reshape(-1, site.units), axis=0)
    return found


def magnitude_relative(model: keras.Model, data: Arrays) -> Importance:
    """`magnitude` over its mean in the layer, so that layers of small weights are not emptied."""
    found = magnitude(model, data)
    return {site: norm / max(norm.mean(), 1e-12) for site, norm in found.items()}


def gamma(model: keras.Model, data: Arrays) -> Importance:
    """Size of a unit's scale in the BatchNormalization behind it (Liu et al. 2017).

    Raises:
      ValueError: a site without one.
    """
    del data
    found = {}
    for site in _sites(model):
        layers = (step.layer for step in site.steps)
        norms = [one for one in layers if isinstance(one, keras.layers.BatchNormalization)]
        if not norms or not norms[0].scale:
            raise ValueError(
                f"'gamma' needs a BatchNormalization with a scale behind every layer; found none "
                f"behind '{site.name}'. Leave out the method gamma, or take another network."
            )
        found[site.name] = np.abs(np.asarray(norms[0].gamma))
    return found


def taylor_squared(model: keras.Model, data: Arrays) -> Importance:
    """Sum over samples of (activation x gradient)^2 (Molchanov et al. 2019)."""
    return _taylor(model, data, tf.square)


def taylor_absolute(model: keras.Model, data: Arrays) -> Importance:
    """Sum over samples of |activation x gradient| (Molchanov et al. 2017)."""
    return _taylor(model, data, tf.abs)


def _taylor(model, data, size):
    """Activation times gradient where the consumers read, summed over a sample's positions."""
    sites = _sites(model)
    leaves = [leaf for site in sites for leaf in site.leaves]
    read = [leaf.consumers[0].operation.input for leaf in leaves]
    inner = keras.Model(model.inputs, [*read, *model.outputs])

    @tf.function(reduce_retracing=True, autograph=False)
    def products(x, y):
        with tf.GradientTape() as tape:
            *values, outputs = inner(x, training=False)
            loss = tf.reduce_sum(keras.losses.sparse_categorical_crossentropy(y, outputs))
        gradients = tape.gradient(loss, values)
        return [_by_unit(v * g, leaf) for v, g, leaf in zip(values, gradients, leaves, strict=True)]

    found = {site.name: np.zeros(site.units) for site in sites}
    for x, y in batches(data):
        parts = iter(products(x, y))
        for site in sites:
            whole = tf.add_n([next(parts) for _ in site.leaves])
            found[site.name] += tf.reduce_sum(size(whole), axis=0).numpy()
    return found


def _by_unit(products, leaf):
    """Sums over positions and a unit's blocks: `[N, ..., size] -> [N, units]`."""
    flat = tf.reduce_sum(products, axis=list(range(1, len(products.shape) - 1)))
    return tf.reduce_sum(tf.gather(flat, leaf.channels.index, axis=-1), axis=-1)


def _sites(model):
    return [site for site in tfgrow.find_sites(model) if site.blocked is None]
