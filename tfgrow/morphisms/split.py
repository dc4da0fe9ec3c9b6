"""Split: one unit becomes two, with incoming weights w + theta and w - theta.

Each child keeps half of the outgoing weights, so the perturbation at the consumer's input is
D = 1/2 [path(u + d) + path(u - d)] - path(u), with d the producer's response to theta. It is
carried exactly through the channelwise path and linearised at the consumer only.

Source: Lawton et al., arXiv 2411.05855; splitting as such: Liu et al., arXiv 1910.02366. By
symmetry the gradient at theta = 0 vanishes and ReLU has no curvature almost everywhere: theta
starts at a random direction of half the weights' size.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgrow.capture.capture import outside_of, producer_responses
from tfgrow.capture.execute import tensor_tap
from tfgrow.capture.path import needs_moments, sizes_of, take
from tfgrow.graph.sites import parameter_name
from tfgrow.morphisms.base import AtInputs, Candidate, Perturbed
from tfgrow.morphisms.path_state import Observer, child_path
from tfgrow.morphisms.weights import random_theta, site_fan_in, unit_scale
from tfgrow.types import ChannelMap, Cost, NewUnit, WidthEdit

START = 0.5
"""Initial size of theta, relative to the unit's weights."""


CHILDREN = ("plus", "minus")
"""The two children, in the state's names; `"now"` is the undisturbed unit."""


class Split(AtInputs):
    """Splits one unit into two. See the module's docstring."""

    name = "split"

    def candidates(self, site, *, new_units, seed):
        del new_units
        rng = np.random.default_rng([seed, *site.name.encode()])
        theta = random_theta(site, START, rng)
        return [
            Candidate(site, self.name, unit, {k: v[unit] for k, v in theta.items()}, {}, Cost())
            for unit in range(site.units)
        ]

    def scale(self, site, units):
        return {
            parameter_name(name, number): unit_scale(node.operation)[units]
            for number, node in enumerate(site.producers)
            for name in node.operation.growable_variables()
        }

    def perturb(self, capture, group, theta, responses, fresh):
        del theta
        path, outside = group.path, outside_of(capture)
        now = [take(u, group.units) for u in producer_responses(capture, group.site)]
        # Both go through the path as one batch: half of the operations to trace.
        together = [_behind_one_another(u + d, u - d) for u, d in zip(now, responses, strict=True)]
        # Children compute with their parent's statistics, so their own are needed only once.
        observer = Observer(path, CHILDREN) if fresh else None
        arriving = path.run(
            together,
            path.live_variables(group.units),
            lambda tensor: _behind_one_another(outside(tensor), outside(tensor)),
            observer,
        )
        values = {}
        for leaf in group.site.leaves:
            plus, minus = _apart(arriving[leaf.tensor])
            undisturbed = _now(capture, group, leaf.tensor, leaf.channels)
            values[leaf.tensor] = 0.5 * (plus + minus) - undisturbed
        if observer is None:
            return Perturbed(values, {})
        return Perturbed(values, {**observer.seen, **_moments_now(capture, group)})

    def edit(self, candidate):
        site, unit = candidate.site, candidate.unit
        weights = site_fan_in(site, [unit])
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


def _now(capture, group, tensor: int, channels: ChannelMap):
    """What the undisturbed units make of a tensor of their path, in the layout of the path."""
    index = group.path.positions(tensor, channels, group.units)
    return take(capture.values[tensor_tap(tensor)], index)


def _moments_now(capture, group) -> dict:
    observer = Observer(group.path, ("now",))
    for number, step in enumerate(group.path.steps):
        if needs_moments(step):
            # no producer's own activation needs any: the source is a tensor of the model
            observer(number, _now(capture, group, step.source, step.incoming))
    return observer.seen


def _behind_one_another(first, second):
    """Two batches as one. As `tf.concat` has it, but with a gradient that is quick to trace."""
    return tf.reshape(tf.stack([first, second]), [-1, *sizes_of(first, slice(1, None))])


def _apart(both) -> list:
    """The two batches of which one was made."""
    return tf.unstack(tf.reshape(both, [2, -1, *sizes_of(both, slice(1, None))]))
