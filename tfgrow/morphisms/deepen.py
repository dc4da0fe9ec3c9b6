"""Deepen: a residual block, x + last(relu(first(x))), whose last layer starts at zero.

`first` is learned by gradient through the closed form of `last`, joint over all units between them.
The block starts narrow: both of its layers are sites of their own and can grow like any other.

Source: Lawton et al., arXiv 2411.05855, name the morphism; a block whose last layer is zero: Zhang,
Dauphin & Ma 2019 (arXiv 1901.09321); outgoing weights in closed form as in `morphisms/add.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from tfgrow.capture.execute import tensor_tap
from tfgrow.layers.conv import CONVOLUTIONS
from tfgrow.layers.dense import Dense
from tfgrow.morphisms.base import Candidate
from tfgrow.morphisms.branch import (
    Branch,
    Branching,
    ends_of,
    flops_at,
    is_convolved,
    once_per_site,
)
from tfgrow.types import BranchEdit, Cost, Demand, NewLayer

UNITS = 4
"""Units between the two new layers."""

KERNEL_SIZE = 3
"""Of the first layer, where it is a convolution."""


class Deepen(Branch):
    """Inserts a residual block at the end of a path. See the module's docstring."""

    name = "deepen"

    @once_per_site
    def branchings(self, site):
        if site.blocked is not None:
            return []
        return [
            Branching(node, node, tensor, tensor, shape, int(shape[-1]))
            for node, tensor in ends_of(site)
            for shape in [tuple(site.graph.tensors[tensor].shape)]
        ]

    def candidates(self, site, *, new_units, seed):
        del new_units
        rng = np.random.default_rng([seed, 2, *site.name.encode()])
        found = []
        for number, place in enumerate(self.branchings(site)):
            shape = (*_kernel_size(site, place), place.channels, UNITS)
            theta = {
                "kernel": _scale(shape) * rng.standard_normal(shape),
                "bias": np.zeros(UNITS),
                "last": np.zeros((UNITS + 1, place.channels)),
            }
            theta = {name: value.astype("float32") for name, value in theta.items()}
            found.append(Candidate(site, self.name, number, theta, {}, Cost()))
        return found

    def demand(self, candidate):
        place = self.branchings(candidate.site)[candidate.unit]
        kernels = [candidate.theta[name].size for name in ("kernel", "last")]
        weights = kernels[0] + kernels[1] - place.channels  # a row of `last` is its bias
        cost = Cost(sum(kernels) + UNITS, flops_at(place, weights))
        return Demand(more=cost, fixed=(place.changed,))

    def scale(self, site, units):
        place = self.branchings(site)[int(units[0])]
        size = _scale((*_kernel_size(site, place), place.channels, UNITS))
        return {name: np.full(len(units), size, "float32") for name in ("kernel", "bias")}

    def features(self, capture, branching, theta):
        values = capture.values[tensor_tap(branching.read)]
        hidden = tf.nn.relu(_response(values, theta["kernel"]) + theta["bias"])
        return tf.concat([hidden, tf.ones_like(hidden[..., :1])], axis=-1)

    def edit(self, candidate):
        site, theta = candidate.site, candidate.theta
        place = self.branchings(site)[candidate.unit]
        name = f"deepen_{place.target.name}"
        size = _kernel_size(site, place)
        kernel, bias = theta["last"][:-1], theta["last"][-1]
        first: dict[str, Any] = {"activation": "relu", "name": name}
        last: dict[str, Any] = {"name": f"{name}_last"}
        kind: type = Dense
        if size:
            kind = CONVOLUTIONS[len(place.shape)]
            first |= {"kernel_size": size, "padding": "same", "filters": UNITS}
            last |= {"kernel_size": 1, "filters": place.channels}
            kernel = kernel.reshape(*[1] * len(size), *kernel.shape)
        else:
            first |= {"units": UNITS}
            last |= {"units": place.channels}
        made = (theta["kernel"], theta["bias"])
        rest = (np.zeros_like(kernel), np.zeros_like(bias))
        layers = (NewLayer(kind, first, made, made), NewLayer(kind, last, (kernel, bias), rest))
        return BranchEdit(site, place.source.name, place.target.name, layers)


def _kernel_size(site, place: Branching) -> tuple[int, ...]:
    convolved = is_convolved(site) and len(place.shape) > 2
    return (KERNEL_SIZE,) * (len(place.shape) - 2) if convolved else ()


def _scale(shape) -> float:
    """Of weights into rectified units (He et al. 2015)."""
    return float(np.sqrt(2.0 / np.prod(shape[:-1])))


def _response(values, kernel):
    if len(kernel.shape) == 2:
        return tf.tensordot(values, kernel, 1)
    return ops.conv(values, kernel, padding="same", data_format="channels_last")
