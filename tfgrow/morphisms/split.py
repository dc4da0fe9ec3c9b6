"""Split: one unit becomes two, with incoming weights w + theta and w - theta.

Each child keeps half of the outgoing weights, so the perturbation at the consumer's input is
D = 1/2 [path(u + d) + path(u - d)] - path(u), with d the producer's response to theta. It is carried
exactly through the channelwise path and linearised at the consumer only.

Source: Lawton et al., arXiv 2411.05855; splitting as such: Liu et al., arXiv 1910.02366. By
symmetry the gradient at theta = 0 vanishes and ReLU has no curvature almost everywhere: theta
starts at a random direction of half the weights' size.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgrow.capture.capture import leaf_taps, producer_input, producer_response
from tfgrow.capture.execute import tensor_tap
from tfgrow.morphisms.path_state import Observer, child_path
from tfgrow.morphisms.base import Candidate, Morphism
from tfgrow.morphisms.weights import as_layer_weights, fan_in_weights, unit_scale
from tfgrow.types import Cost, NewUnit, WidthEdit

START = 0.5
"""Initial size of theta, relative to the unit's weights."""


class Split(Morphism):
    """Splits one unit into two. See the module's docstring."""

    name = "split"
    learned = ("kernel", "bias")

    def candidates(self, site, *, new_units, seed):
        del new_units
        rng = np.random.default_rng([seed, *site.name.encode()])
        scale = START * unit_scale(site)
        weights = fan_in_weights(site.producer)
        start = rng.standard_normal(weights["kernel"].shape).astype("float32")
        start *= scale.reshape(-1, *[1] * (start.ndim - 1))
        theta = {"kernel": start}
        if "bias" in weights:
            theta["bias"] = np.zeros_like(weights["bias"])
        return [
            Candidate(site, self.name, unit, {k: v[unit] for k, v in theta.items()}, {}, Cost())
            for unit in range(site.units)
        ]

    def taps(self, site):
        return leaf_taps(site)

    def scale(self, site, units):
        size = unit_scale(site)[units]
        return {"kernel": size, "bias": size}

    def _perturbation(self, capture, group, theta, observe=None):
        """By leaf, `[N, ..., size]`: the change at the consumers' input."""
        site, path = group.site, group.path
        theta = {name: theta[name] for name in site.producer.growable_variables()}
        weights = as_layer_weights(site.producer, theta)
        step = site.producer.linear(producer_input(capture, site), **weights)
        response = tf.gather(producer_response(capture, site), group.units, axis=-1)
        variables = path.live_variables(group.units)
        observe = observe or {}
        up = path.run(response + step, variables, observe.get("plus"))
        down = path.run(response - step, variables, observe.get("minus"))
        now = path.run(response, variables, observe.get("now"))
        return {leaf: 0.5 * (up[leaf] + down[leaf]) - now[leaf] for leaf in now}

    def scalars(self, capture, group, theta, fresh):
        del fresh
        delta = self._perturbation(capture, group, theta)
        totals = None
        for leaf in group.site.leaves:
            index = group.path.positions(leaf.tensor, leaf.channels, group.units)
            parts = [
                group.path.per_unit(leaf.tensor, tf.gather(c, index, axis=-1) * delta[leaf.tensor])
                for c in capture.cotangents(tensor_tap(leaf.tensor))
            ]
            totals = parts if totals is None else [a + b for a, b in zip(totals, parts, strict=True)]
        return totals

    def tangents(self, capture, group, theta):
        delta = self._perturbation(capture, group, theta)
        tangents = {}
        for leaf in group.site.leaves:
            index = group.path.positions(leaf.tensor, leaf.channels, group.units)
            scatter = tf.one_hot(index, leaf.channels.size, dtype=tf.float32)
            tangents[tensor_tap(leaf.tensor)] = tf.tensordot(delta[leaf.tensor], scatter, 1)
        return tangents

    def moments(self, capture, group, theta):
        observers = {who: Observer(group.path, who) for who in ("plus", "minus", "now")}
        self._perturbation(capture, group, theta, observers)
        return {name: v for observer in observers.values() for name, v in observer.seen.items()}

    def edit(self, candidate):
        site, unit = candidate.site, candidate.unit
        weights = fan_in_weights(site.producer, [unit])
        children = []
        for child, sign in (("plus", 1.0), ("minus", -1.0)):
            fan_in = {
                name: (value[0] + sign * candidate.theta[name]).astype("float32")
                for name, value in weights.items()
            }
            children.append(
                NewUnit(
                    source=unit,
                    fan_in=fan_in,
                    path=child_path(candidate, child),
                    fan_out=(0.5,) * len(site.consumers),
                    gradient_scale=0.5,
                )
            )
        return WidthEdit(site, {unit: children[0]}, (children[1],))

    def scaled(self, candidate, alpha):
        theta = {name: alpha * value for name, value in candidate.theta.items()}
        return candidate.replace(theta=theta, state={**candidate.state, "alpha": np.float32(alpha)})
