"""Add: a new unit with incoming weights theta_in and outgoing weights phi.

At phi = 0 the function is unchanged. The perturbation is at the consumers' responses, D = phi * h
with h = path(theta_in's response), so the estimate is quadratic in phi: with G the mean gradient
and Q the Gauss-Newton matrix with respect to phi, phi = -(Q + damping)^-1 G in closed form;
theta_in is improved by gradient through it.

Source: Lawton et al., arXiv 2411.05855; closed-form outgoing weights as in Verbockhaven et al. 2024
(TINY), here in the Gauss-Newton metric of the loss.

Layouts: phi of a consumer is `[n, T, B, O]`; the units of one group are separate candidates.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import tensorflow as tf

from tfgrow.capture.capture import consumer_taps, outside_of
from tfgrow.capture.execute import tensor_tap
from tfgrow.capture.path import take
from tfgrow.curvature.normal import (
    cross_damping,
    dense_sums,
    kronecker_sums,
    quadratic,
    solve_sums,
    zero_sums,
)
from tfgrow.graph.sites import parameter_name
from tfgrow.morphisms.base import Candidate, Morphism, Perturbed
from tfgrow.morphisms.path_state import (
    Observer,
    newborn_path,
    stacked_path_variables,
    state_moments,
)
from tfgrow.morphisms.weights import site_fan_in, typical_scale
from tfgrow.types import NEWBORN, Cost, NewUnit, WidthEdit

DENSE_LIMIT = 600
"""Above so many outgoing weights of one unit, Q is Kronecker-factored."""


class Add(Morphism):
    """Adds one unit. See the module's docstring."""

    name = "add"
    solved = ("phi",)
    edits_unit = False
    dense_limit: ClassVar[int] = DENSE_LIMIT

    def candidates(self, site, *, new_units, seed):
        rng = np.random.default_rng([seed, 1, *site.name.encode()])
        found = []
        for number in range(new_units):
            theta = {
                name: np.zeros(value.shape[1:]) for name, value in site_fan_in(site, [0]).items()
            }
            for producer, node in enumerate(site.producers):
                kernel = parameter_name(node.operation.kernel_name, producer)
                direction = rng.standard_normal(theta[kernel].shape)
                theta[kernel] = typical_scale(node.operation) * direction
            for index, shape in enumerate(_phi_shapes(site)):
                theta[f"phi/{index}"] = np.zeros(shape)
            theta = {name: value.astype("float32") for name, value in theta.items()}
            template = {"template": np.asarray(rng.integers(site.units))}
            found.append(Candidate(site, self.name, number, theta, template, Cost()))
        return found

    def taps(self, site):
        return consumer_taps(site)

    def scale(self, site, units):
        return {
            parameter_name(name, number): np.full(
                len(units), typical_scale(node.operation), dtype="float32"
            )
            for number, node in enumerate(site.producers)
            for name in node.operation.growable_variables()
        }

    def perturb(self, capture, group, theta, responses, fresh):
        path, outside = group.path, outside_of(capture)
        templates = group.static["template"].reshape(-1).tolist()
        if fresh:
            observer = Observer(path, ("new",))
            live = path.live_variables(templates)
            return Perturbed(
                path.run_newborn(responses, live, outside, observer.keep), observer.seen
            )
        variables = stacked_path_variables(
            path, templates, lambda number: state_moments(theta, "new", number)
        )
        return Perturbed(path.run(responses, variables, outside), {})

    def covectors(self, capture, group, theta, perturbed):
        covectors = {}
        for index, (leaf, node) in enumerate(_reads(group.site)):
            kernel = _group_kernel(group, leaf, node, theta[f"phi/{index}"])
            cotangents = capture.cotangents[consumer_taps(group.site)[index]]
            like = perturbed.values[leaf.tensor]
            pulled = _pull_back(node.operation, like, kernel, cotangents)
            known = covectors.get(leaf.tensor)
            covectors[leaf.tensor] = pulled if known is None else known + pulled
        return covectors

    def tangents(self, group, theta, perturbed):
        tangents = {}
        for index, (leaf, node) in enumerate(_reads(group.site)):
            kernel = _group_kernel(group, leaf, node, theta[f"phi/{index}"])
            tap = consumer_taps(group.site)[index]
            tangents[tap] = node.operation.linear(perturbed.values[leaf.tensor], kernel)
        return tangents

    def equations(self, capture, group, perturbed):
        seen, cotangents = [], []
        for index, (leaf, node) in enumerate(_reads(group.site)):
            patches = node.operation.unfold(perturbed.values[leaf.tensor])
            seen.append(self._together(_unit_patches(group.path, leaf.tensor, patches)))
            stacked = capture.cotangents[consumer_taps(group.site)[index]]
            outputs = stacked.shape[-1]
            positions = seen[-1].shape[2] or tf.shape(seen[-1])[2]
            cotangents.append(tf.reshape(stacked, (stacked.shape[0], -1, positions, outputs)))
        sums = (dense_sums if self._dense(group.site) else kronecker_sums)(seen, cotangents)
        energies = _energies(capture, group, perturbed)
        energies["energy"] = tf.reduce_mean(tf.reshape(energies["energy"], (-1, self.together)), 1)
        return {**sums, **energies}

    def no_equations(self, group):
        sizes = [
            (self.together * taps * blocks, outputs)
            for taps, blocks, outputs in _phi_shapes(group.site)
        ]
        return zero_sums(len(group.units), sizes, self._dense(group.site))

    def solve(self, group, sums, damping):
        solution, start, solved = solve_sums(sums, damping), 0, {}
        for index in range(len(group.site.consumers)):
            shape = group.theta[f"phi/{index}"].shape[1:]
            size = int(np.prod(shape))
            solved[f"phi/{index}"] = tf.reshape(solution[:, start : start + size], (-1, *shape))
            start += size
        return solved

    def _dense(self, site) -> bool:
        sizes = (int(np.prod(shape)) for shape in _phi_shapes(site))
        return self.together * sum(sizes) <= self.dense_limit

    def _together(self, patches):
        """`[N, n * k, P, A] -> [N, n, P, k * A]`: k units of a candidate have one closed form."""
        if self.together == 1:
            return patches
        positions, size = patches.shape[2] or tf.shape(patches)[2], patches.shape[3]
        apart = tf.reshape(patches, (tf.shape(patches)[0], -1, self.together, positions, size))
        apart = tf.transpose(apart, (0, 1, 3, 2, 4))
        units = patches.shape[1] // self.together
        return tf.reshape(apart, (-1, units, positions, self.together * size))

    def choose_damping(self, group, first, second):
        del group
        return cross_damping(first, second, solve_sums, quadratic)

    def edit(self, candidate):
        site = candidate.site
        fan_in = {name: candidate.theta[name] for name in site_fan_in(site, [0])}
        rows = [candidate.theta[f"phi/{index}"] for index in range(len(site.consumers))]
        unit = NewUnit(
            source=NEWBORN,
            fan_in=fan_in,
            path=newborn_path(candidate, "new", int(candidate.state["template"])),
            fan_out=tuple(rows),
        )
        return WidthEdit(site, {}, (unit,))

    def scaled(self, candidate, alpha):
        theta = {
            name: value * alpha if name.startswith("phi/") else value
            for name, value in candidate.theta.items()
        }
        return candidate.replace(theta=theta)


def _energies(capture, group, perturbed) -> dict:
    """How much the new units hand to the consumers, and how much the live ones do on average."""
    energy, usual = 0.0, 0.0
    for leaf in group.site.leaves:
        new = perturbed.values[leaf.tensor]
        squares = tf.reduce_sum(new * new, axis=list(range(len(new.shape) - 1)))
        energy += tf.reduce_sum(group.path.by_unit(leaf.tensor, squares), axis=-1)
        live = take(capture.values[tensor_tap(leaf.tensor)], leaf.channels.index.reshape(-1))
        usual += tf.reduce_sum(live * live) / group.site.units
    return {"energy": energy, "usual": usual}


def _reads(site):
    """Every (leaf, consumer node), in the order of `Site.consumers`."""
    return [(leaf, node) for leaf in site.leaves for node in leaf.consumers]


def _phi_shapes(site) -> list[tuple[int, int, int]]:
    """`(T, B, O)` per consumer."""
    shapes = []
    for leaf, node in _reads(site):
        taps = int(np.prod(node.operation.kernel_spatial, dtype=np.int64))
        shapes.append((taps, leaf.channels.blocks, node.operation.growth_units))
    return shapes


def _unit_patches(path, tensor, patches):
    """`[N, size, P, T] -> [N, n, P, T*B]`."""
    if path.maps[tensor].blocks == 1:
        return patches
    by_unit = path.by_unit(tensor, tf.transpose(patches, (0, 2, 3, 1)))  # [N, P, T, n, B]
    by_unit = tf.transpose(by_unit, (0, 3, 1, 2, 4))
    positions = by_unit.shape[2] or tf.shape(by_unit)[2]
    return tf.reshape(by_unit, (-1, path.count, positions, by_unit.shape[3] * by_unit.shape[4]))


def _group_kernel(group, leaf, node, phi):
    """`[n, T, B, O]` -> a kernel of the consumer that reads the group's units."""
    index = group.path.maps[leaf.tensor].index
    order = np.empty(index.size, dtype=np.int64)
    order[index.reshape(-1)] = np.arange(index.size)
    rows = tf.transpose(phi, (1, 0, 2, 3))
    taps, outputs = phi.shape[1], phi.shape[3]
    rows = take(tf.reshape(rows, (taps, -1, outputs)), order, axis=1)
    return node.operation.kernel_from_rows(rows)


def _pull_back(layer, value, kernel, cotangents):
    """The transpose of the consumer's linear map on cotangents `[1 + K, N, ...]` of its response.

    It depends on the shape of the layer's input only, never on its values.
    """
    kernel = tf.stop_gradient(kernel)
    passes, known = cotangents.shape[0], tuple(value.shape[1:])
    # The channels as a number: grappler takes the split of a tensor for as wide as the whole.
    inner = [tf.shape(value)[1:-1], [known[-1]]]
    folded = tf.reshape(cotangents, tf.concat([[-1], tf.shape(cotangents)[2:]], axis=0))
    shape = tf.concat([[passes * tf.shape(value)[0]], *inner], axis=0)
    anywhere = tf.ensure_shape(tf.zeros(shape), (None, *known))
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(anywhere)
        response = layer.linear(anywhere, kernel)
    pulled = tape.gradient(response, anywhere, output_gradients=folded)
    shape = tf.concat([[passes, -1], *inner], axis=0)
    pulled = tf.ensure_shape(tf.reshape(pulled, shape), (passes, None, *known))
    return tf.stop_gradient(pulled)
