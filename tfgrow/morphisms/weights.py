"""Weights of single units, candidate axis first, to and from a layer's own layout."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tfgrow.graph.sites import Site, parameter_name
from tfgrow.layers.growable import Mixing


def fan_in_weights(layer: Mixing, units=None) -> dict[str, np.ndarray]:
    """The incoming weights of units: `{"kernel": [n, ..., in], "bias": [n]}` in float32."""
    weights = {}
    for name, variable in layer.growable_variables().items():
        axis = out_axis(layer, name)
        values = np.moveaxis(np.asarray(variable, dtype="float32"), axis, 0)
        weights[name] = values if units is None else values[np.asarray(units)]
    return weights


def site_fan_in(site: Site, units=None) -> dict[str, np.ndarray]:
    """`fan_in_weights` of all of a site's producers, under their names in theta."""
    return {
        parameter_name(name, number): value
        for number, node in enumerate(site.producers)
        for name, value in fan_in_weights(node.operation, units).items()
    }


def random_theta(site: Site, size: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A direction at random for the kernels of a site's units, of `size` times theirs; else 0."""
    theta = {name: np.zeros_like(value) for name, value in site_fan_in(site).items()}
    for number, node in enumerate(site.producers):
        kernel = parameter_name(node.operation.kernel_name, number)
        start = rng.standard_normal(theta[kernel].shape).astype("float32")
        scale = size * unit_scale(node.operation)
        theta[kernel] = start * scale.reshape(-1, *[1] * (start.ndim - 1))
    return theta


def as_layer_weights(layer: Mixing, theta: Mapping, producer: int = 0) -> dict:
    """`{"kernel": [n, ...]}` tensors in the layout of the layer, as `linear` takes them.

    Args:
      layer: one of a site's producers.
      theta: parameters of the site's candidates.
      producer: the layer's number among the site's producers.
    """
    weights = {}
    for name in layer.growable_variables():
        value = theta[parameter_name(name, producer)]
        axis = out_axis(layer, name) % len(value.shape)
        order = [*range(1, len(value.shape))]
        order.insert(axis, 0)
        weights[name] = tf.transpose(value, order)
    return weights


def out_axis(layer: Mixing, name: str) -> int:
    """The axis of a producer's variable that its units lie on."""
    axis = layer.variable_axes[name].fan_out
    if axis is None:
        raise ValueError(
            f"variable_axes['{name}'] of layer '{layer.name}' ({type(layer).__name__}) has no "
            "fan_out: say which of its axes the units lie on."
        )
    return axis


def unit_scale(layer: Mixing) -> np.ndarray:
    """Root mean square `[units]` of each unit's kernel; the layer's own where a unit's is zero."""
    return root_mean_squares(fan_in_weights(layer)[layer.kernel_name])


def root_mean_squares(kernel: np.ndarray) -> np.ndarray:
    """Of each unit's weights `[units, ...]`; where they are zero, what is usual for the others."""
    rms = np.sqrt(np.mean(kernel.reshape(len(kernel), -1) ** 2, axis=1))
    usual = rms[rms > 0].mean() if (rms > 0).any() else 1.0 / np.sqrt(kernel[0].size)
    return np.where(rms > 0, rms, usual).astype("float32")


def typical_scale(layer: Mixing) -> float:
    """Root mean square of all units' kernels, those that are zero left out."""
    return typical(unit_scale(layer))


def typical(scales: np.ndarray) -> float:
    """The scale of a new unit beside units of some scales."""
    return float(np.sqrt(np.mean(scales**2)))
