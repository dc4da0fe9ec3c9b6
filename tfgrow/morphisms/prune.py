"""Prune: a unit goes, and the others stand in for it.

Its values at the consumers become `sum_j share_j a_j`, a combination of the site's other units
folded into the consumers' weights (W_j += share_j W_c), so that the perturbation at its channel is
D = sum_j share_j a_j - a_c. What is constant goes to the consumers' biases, or to the moving means
behind them: `offset` times what the unit's outgoing weights make of a 1 everywhere, beyond the
border too. The estimate is quadratic in shares and offset, and they have a closed form: least
squares in the Gauss-Newton metric, with the gradient's pull.

Source: in the spirit of Optimal Brain Surgeon (Hassibi & Stork 1993), for whole units, in the
metric of Lawton et al., arXiv 2411.05855.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrow.capture.capture import consumer_taps
from tfgrow.capture.execute import Tap, linear_tap, tensor_tap, weights_of
from tfgrow.capture.path import Path, apart
from tfgrow.curvature.normal import cross_damping
from tfgrow.curvature.stand_in import change, solve, spread_out, stand_in_sums, zero_sums
from tfgrow.graph.constants import absorber_of
from tfgrow.graph.sites import Site
from tfgrow.morphisms.base import AtInputs, Candidate, Perturbed
from tfgrow.morphisms.weights import site_fan_in
from tfgrow.types import Cost, RemovedUnit, WidthEdit

AT_ONCE = 0.25
"""Share of a site's units that may go at once, and are therefore not to stand in for each other.

Mean real change of a VGG's loss by a removal in its first four layers (CIFAR-10): 0.165, 0.171,
0.044, 0.030 at a half, 0.133, 0.143, 0.027, 0.019 at a quarter.
"""

CONSTANT = "constant"
"""What the offset is a factor of, among the places at which a removal changes something."""


class Prune(AtInputs):
    """Takes one unit away. See the module's docstring."""

    name = "prune"
    solved = ("share", "offset")
    reads_producer = False
    units = -1

    def candidates(self, site, *, new_units, seed):
        del new_units, seed
        if site.units < 2:
            return []
        theta = {"share": np.zeros(site.units, "float32"), "offset": np.zeros((), "float32")}
        return [
            Candidate(site, self.name, unit, dict(theta), {}, Cost()) for unit in range(site.units)
        ]

    def taps(self, site):
        return [*super().taps(site), *(consumer_taps(site) if takes_constant(site) else ())]

    def scale(self, site, units):
        del site, units
        return {}

    def perturb(self, capture, group, theta, responses, fresh):
        del responses, fresh
        if "share" not in theta:  # not solved yet, and nothing in it is improved by gradient
            return Perturbed({}, {})
        itself = _itself(group)
        v = tf.convert_to_tensor(theta["share"] * (1.0 - itself) - itself)
        values: dict[Hashable, Any] = {
            leaf.tensor: group.path.lay_out(
                leaf.tensor, tf.linalg.matmul(v, _by_unit(capture, leaf))
            )
            for leaf in group.site.leaves
        }
        if takes_constant(group.site):
            values[CONSTANT] = theta["offset"]
        return Perturbed(values, {})

    def covectors(self, capture, group, theta, perturbed):
        covectors = super().covectors(capture, group, theta, perturbed)
        if takes_constant(group.site):
            parts = [
                tf.matmul(_over_positions(capture.cotangents[tap]), made, transpose_b=True)
                for tap, made in _of_ones(group).items()
            ]
            covectors[CONSTANT] = tf.add_n(parts)
        return covectors

    def scalars(self, group, covectors, perturbed):
        parts = {place: covectors[place] * value for place, value in perturbed.values.items()}
        alone = [parts.pop(CONSTANT)] if CONSTANT in parts else []
        return tf.add_n([*(group.path.per_unit(*part) for part in parts.items()), *alone])

    def slopes(self, group, weights, covectors):
        at_leaves = {place: c for place, c in covectors.items() if place != CONSTANT}
        slopes = super().slopes(group, weights, at_leaves)
        if CONSTANT in covectors:
            slopes[CONSTANT] = tf.reduce_sum(weights * covectors[CONSTANT], axis=0)
        return slopes

    def tangents(self, group, theta, perturbed):
        tangents = super().tangents(group, theta, perturbed)
        for tap, made in _of_ones(group).items() if takes_constant(group.site) else ():
            offset = perturbed.values[CONSTANT]  # `[n]`, or by sample `[N, n]`
            change = tf.matmul(tf.reshape(offset, (-1, len(group.units))), made)
            tangents[tap] = _at_every_position(group.site.graph, tap, change)
        return tangents

    def equations(self, capture, group, perturbed):
        at_units = self.covectors(capture, group, {}, perturbed)
        values, covectors = [], []
        for leaf in group.site.leaves:
            live, blocks = _by_unit(capture, leaf), leaf.channels.blocks
            flat = tf.reshape(live, (tf.shape(live)[0], -1, group.site.units, blocks))
            values.append(flat)
            mine = group.path.by_unit(leaf.tensor, at_units[leaf.tensor])
            shape = (mine.shape[0], tf.shape(flat)[0], -1, len(group.units), blocks)
            covectors.append(tf.reshape(mine, shape))
        return stand_in_sums(values, covectors, at_units.get(CONSTANT))

    def no_equations(self, group):
        return zero_sums(len(group.units), group.site.units)

    def solve(self, group, sums, damping):
        free = self.stand_ins(group, sums, damping)
        v = tf.cast(solve(sums, free, group.units, damping), tf.float32)
        share, offset = v[:, :-1], v[:, -1]
        return {"share": share * (1.0 - _itself(group)), "offset": offset}

    def stand_ins(self, group, sums, damping) -> np.ndarray:
        """Which of the site's units, and the constant, may stand in: bool `[units + 1]`."""
        most = int(AT_ONCE * group.site.units)
        return spread_out(sums, _free(group), group.units, damping, most)

    def choose_damping(self, group, first, second):
        return cross_damping(
            first,
            second,
            lambda sums, damping: solve(sums, _free(group), group.units, damping),
            lambda sums, v: change(sums, group.units, v),
            generous=1.0,  # here the longer step is the smaller perturbation
        )

    def edit(self, candidate):
        share = np.asarray(candidate.theta["share"])
        gone = RemovedUnit(share, float(candidate.theta["offset"]))
        return WidthEdit(candidate.site, removed={candidate.unit: gone})

    def scaled(self, candidate, alpha):
        return candidate if alpha == 1.0 else None

    def reliance(self, candidate, units):
        return np.abs(candidate.theta["share"][np.asarray(units)])


class PruneAlone(Prune):
    """Takes one unit away and no other, so that all others may stand in for it."""

    name = "prune_alone"

    def stand_ins(self, group, sums, damping):
        del sums, damping
        return _free(group)


def _by_unit(capture, leaf):
    """What all of the site's units hand to a leaf's consumers: `[N, ..., units, blocks]`."""
    return apart(capture.values[tensor_tap(leaf.tensor)], leaf.channels)


def takes_constant(site: Site) -> bool:
    """Whether what a unit hands to the consumers can be replaced by a constant too."""
    nodes = [node for leaf in site.leaves for node in leaf.consumers]
    return all(absorber_of(site.graph, node) is not None for node in nodes)


def _of_ones(group) -> dict[Tap, tf.Tensor]:
    """By tap of a consumer's response, what the units would make there if they were 1: `[n, O]`.

    As it is where all taps of a kernel are inside: a bias knows no border.
    """
    return {
        linear_tap(node.index): _rows(node.operation, leaf.channels.index[group.units])
        for leaf in group.site.leaves
        for node in leaf.consumers
    }


def _rows(layer, index: np.ndarray):
    """The sums of a layer's weights from the inputs `index [n, B]` to each output, `[n, O]`."""
    kernel = weights_of(layer)[layer.kernel_name]
    axes = layer.variable_axes[layer.kernel_name]
    fan_in, fan_out = (axis % len(kernel.shape) for axis in (axes.fan_in, axes.fan_out))
    others = [axis for axis in range(len(kernel.shape)) if axis not in (fan_in, fan_out)]
    summed = tf.reduce_sum(tf.transpose(kernel, (*others, fan_in, fan_out)), range(len(others)))
    return tf.reduce_sum(tf.gather(summed, index), axis=1)


def _at_every_position(graph, tap: Tap, change):
    """`[N, O] -> [N, 1, ..., O]`, of the rank of a consumer's response."""
    response = graph.tensors[graph.nodes[tap[1]].outputs[0]]
    inner = [1] * (len(response.shape) - 2)
    return tf.reshape(change, (-1, *inner, change.shape[-1]))


def _over_positions(cotangents):
    """`[1 + K, N, ..., O] -> [1 + K, N, O]`."""
    return tf.reduce_sum(cotangents, axis=list(range(2, len(cotangents.shape) - 1)))


def _itself(group) -> np.ndarray:
    return np.eye(group.site.units, dtype="float32")[group.units]


def _free(group) -> np.ndarray:
    """Which entries of v may be used, `[units + 1]`: every unit's, and the constant if it can."""
    free = np.ones(group.site.units + 1, dtype=bool)
    free[-1] = takes_constant(group.site)
    return free


def copies_of(site: Site) -> list[list[int]]:
    """Per unit of a site, the others that hand exactly the same to the consumers."""
    parts = [*site_fan_in(site).values()]
    path = Path(site, site.units)
    every = range(site.units)
    for step, variables in zip(path.steps, path.live_variables(every), strict=True):
        for name, value in variables.items():
            axis = step.layer.variable_axes[name].channel
            index = step.view.variable_map(name, path.maps[step.source]).index
            parts.append(np.moveaxis(np.asarray(value), axis, 0)[index])
    rows = np.concatenate([np.reshape(part, (site.units, -1)) for part in parts], axis=1)
    _, kind = np.unique(rows, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    members = [np.flatnonzero(kind == kind[unit]).tolist() for unit in every]
    return [[other for other in members[unit] if other != unit] for unit in every]
