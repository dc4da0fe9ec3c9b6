"""Retrain: what training the weights that a layer has would bring anyway.

It is no edit of the network. Its candidates are directions, one per output of a mixing layer (or
one per layer, where there are many): the Gauss-Newton step of those outputs' weights, the kernel's
and a bias, on the estimate, in closed form. `GaussNewtonEstimator.settle` takes them as done.

Source: that new units count for what existing ones can't do is from Verbockhaven et al. 2024
(TINY); here in the Gauss-Newton metric of the loss, and for the weights of all layers. The step is
that of K-FAC (Martens and Grosse 2015, Grosse and Martens 2016).

Layouts: a candidate's `step` is `[b, A]`, b outputs and `A = T * (c + 1)`: the taps of the kernel
times its input channels, the last of which is a constant 1. A group is one layer.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgrow.capture.capture import producer_inputs
from tfgrow.capture.execute import linear_tap
from tfgrow.curvature.normal import (
    WIDE,
    cross_damping,
    quadratic,
    solve_factored,
    solve_sums,
    zero_sums,
)
from tfgrow.graph.sites import sites_of
from tfgrow.morphisms.base import Candidate, Morphism, Perturbed
from tfgrow.morphisms.factored import factored_sums
from tfgrow.types import Cost

MOST_INPUTS = 2304
"""Largest number of weights of one output: beyond, their correlations fill the memory."""

MOST_DIRECTIONS = 1024
"""Of more outputs in a network, those of a layer go together."""


class Retrain(Morphism):
    """Directions of the weights there are. See the module's docstring."""

    name = "retrain"
    solved = ("step",)
    reads_producer = False
    edits_unit = False
    units = 0

    def reason(self, site):
        if any(_trains(site, number) for number in range(len(site.producers))):
            return None
        return site.blocked or f"no weights of '{site.name}' are trained"

    def candidates(self, site, *, new_units, seed, together=False):
        """One per output, or one per layer if they go `together`."""
        del new_units, seed
        found = []
        for number in filter(lambda number: _trains(site, number), range(len(site.producers))):
            outputs = site.producers[number].operation.growth_units
            block = outputs if together else 1
            theta = {"step": np.zeros((block, _size(site, number)), "float32")}
            state = {"producer": np.asarray(number)}
            found += [
                Candidate(site, self.name, unit, theta, state, Cost())
                for unit in range(outputs // block)
            ]
        return found

    def group_key(self, candidate):
        return int(candidate.state["producer"])

    def taps(self, site):
        return [linear_tap(node.index) for node in site.producers]

    def scale(self, site, units):
        del site, units
        return {}

    def perturb(self, capture, group, theta, responses, fresh):
        del responses
        if fresh:  # while the step is not known yet
            return Perturbed({}, {})
        node, read = _node(group), _with_constant(capture, group)
        step = tf.reshape(theta["step"], (-1, theta["step"].shape[-1]))
        rows = tf.reshape(tf.transpose(step), _rows_shape(group))
        change = node.operation.linear(read, node.operation.kernel_from_rows(rows))
        return Perturbed({node.index: change}, {})

    def covectors(self, capture, group, theta, perturbed):
        del theta, perturbed
        index = _node(group).index
        return {index: capture.cotangents[linear_tap(index)]}

    def scalars(self, group, covectors, perturbed):
        index = _node(group).index
        product = covectors[index] * perturbed.values[index]
        by_output = tf.reduce_sum(product, list(range(2, len(product.shape) - 1)))
        count, block, _ = group.theta["step"].shape
        return tf.reduce_sum(tf.reshape(by_output, (by_output.shape[0], -1, count, block)), -1)

    def tangents(self, group, theta, perturbed):
        del group, theta
        return {linear_tap(place): value for place, value in perturbed.values.items()}

    def equations(self, capture, group, perturbed):
        del perturbed
        layer, read = _node(group).operation, _with_constant(capture, group)
        return factored_sums(
            lambda rows: layer.linear(read, layer.kernel_from_rows(rows)),
            _rows_shape(group),
            lambda some: tf.transpose(layer.unfold(some), (0, 2, 3, 1)),  # [N, P, T, c]
            read,
            capture.cotangents[linear_tap(_node(group).index)],
        )

    def no_equations(self, group):
        outputs, size = _shape(group)
        return zero_sums(1, [(size, outputs)], dense=False)

    def solve(self, group, sums, damping):
        outputs, size = _shape(group)
        solution = tf.reshape(_solver(group)(sums, damping), (size, outputs))
        return {"step": tf.reshape(tf.transpose(solution), group.theta["step"].shape)}

    def choose_damping(self, group, first, second):
        return cross_damping(first, second, _solver(group), quadratic)

    def scaled(self, candidate, alpha):
        return candidate.replace(theta={"step": alpha * candidate.theta["step"]})


def retraining(model, graph) -> list[Candidate]:
    """Of all layers of a model that mix channels and are trained."""
    kind = Retrain()
    sites = [site for site in sites_of(model, graph) if kind.reason(site) is None]
    layers = [node.operation for site in sites for node in site.producers if node.mixing]
    many = sum(layer.growth_units for layer in layers) > MOST_DIRECTIONS
    return [
        candidate
        for site in sites
        for candidate in kind.candidates(site, new_units=1, seed=0, together=many)
    ]


def _shape(group) -> tuple[int, int]:
    """Outputs of a group's layer, and weights of each."""
    count, block, size = group.theta["step"].shape
    return count * block, size


def _solver(group):
    return solve_factored if max(_shape(group)) > WIDE else solve_sums


def _number(group) -> int:
    return int(group.static["producer"][0])


def _node(group):
    return group.site.producers[_number(group)]


def _rows_shape(group) -> tuple[int, int, int]:
    """`(T, c + 1, O)` of a group's layer."""
    outputs, size = _shape(group)
    taps = _taps(_node(group).operation)
    return taps, size // taps, outputs


def _taps(layer) -> int:
    return int(np.prod(layer.kernel_spatial, dtype=np.int64))


def _with_constant(capture, group):
    """What the layer reads, and a channel of ones behind it."""
    read = producer_inputs(capture, group.site)[_number(group)]
    return tf.concat([read, tf.ones_like(read[..., :1])], axis=-1)


def _size(site, number: int) -> int:
    node = site.producers[number]
    channels = int(site.graph.tensors[node.inputs[0]].shape[-1])
    return _taps(node.operation) * (channels + 1)


def _trains(site, number: int) -> bool:
    node = site.producers[number]
    return (
        node.mixing
        and bool(node.operation.trainable)
        and node.operation.variable_axes[node.operation.kernel_name].fan_in is not None
        and _size(site, number) <= MOST_INPUTS
    )
