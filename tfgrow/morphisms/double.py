"""Double: all units of a site become two at once, with incoming weights w + theta and w - theta.

Where a layer normalises over the channels, no single unit can be split or added without changing
what the others hand on; but if every channel is there twice, mean and variance are as they were. At
theta = 0 the function is unchanged, each child keeping half of the outgoing weights. The
perturbation at the consumers' inputs is that of a split of every unit, D = 1/2 (path+ + path-) -
path, with both halves carried through the path side by side: what is normalised there is all of
them.

Source: splits as in Lawton et al., arXiv 2411.05855; widening past a normalisation over channels by
whole copies: Chen et al. 2022 (bert2BERT, arXiv 2110.07143), there without a learned difference.

Layouts: theta has the names of the producers' variables, each `[n, units, ...]`; a group is one
candidate.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgrow.capture.capture import outside_of, producer_inputs, producer_responses
from tfgrow.capture.execute import tensor_tap
from tfgrow.capture.path import Path, take
from tfgrow.graph.sites import parameter_name
from tfgrow.morphisms.base import AtInputs, Candidate, OneByOne, Perturbed
from tfgrow.morphisms.weights import as_layer_weights, random_theta, site_fan_in, typical_scale
from tfgrow.types import Cost, Demand, NewUnit, WidthEdit

START = 0.25
"""Initial size of theta, relative to the units' weights."""


class Double(OneByOne, AtInputs):
    """Doubles the units of a site. See the module's docstring."""

    name = "double"
    reads_producer = False
    edits_unit = False
    units = 0  # not one by one

    def reason(self, site):
        if site.doubles:
            return None
        if site.blocked is not None:
            return site.blocked
        return f"the units of '{site.name}' can be split one by one"

    def demand(self, candidate):
        return Demand(units=candidate.site.units)

    def newborn(self, candidate):
        return candidate.site.units

    def candidates(self, site, *, new_units, seed):
        del new_units
        rng = np.random.default_rng([seed, 3, *site.name.encode()])
        theta = random_theta(site, START, rng)
        return [Candidate(site, self.name, 0, theta, {}, Cost())]

    def scale(self, site, units):
        return {
            parameter_name(name, number): np.full(len(units), typical_scale(node.operation))
            for number, node in enumerate(site.producers)
            for name in node.operation.growable_variables()
        }

    def perturb(self, capture, group, theta, responses, fresh):
        del responses, fresh
        site, twice = group.site, Path(group.site, 2 * group.site.units)
        mine = {name: value[0] for name, value in theta.items()}
        both = []
        now = zip(
            site.producers, producer_inputs(capture, site), producer_responses(capture, site),
            strict=True,
        )  # fmt: skip
        for number, (node, read, response) in enumerate(now):
            layer = node.operation
            change = layer.linear(read, **as_layer_weights(layer, mine, number))
            both.append(tf.concat([response + change, response - change], axis=-1))
        arriving = twice.run(both, twice.live_variables(_twice(site)), outside_of(capture))
        return Perturbed(
            {
                leaf.tensor: _mean_of_halves(twice, leaf, arriving[leaf.tensor])
                - take(capture.values[tensor_tap(leaf.tensor)], _order(leaf))
                for leaf in site.leaves
            },
            {},
        )

    def order(self, group, leaf):
        del group
        return _order(leaf)

    def edit(self, candidate):
        site = candidate.site
        weights, paths = site_fan_in(site), _unit_paths(site)
        plus, minus = ([*_children(candidate, sign, weights, paths)] for sign in (1.0, -1.0))
        return WidthEdit(site, dict(enumerate(plus)), tuple(minus))

    def scaled(self, candidate, alpha):
        theta = {name: alpha * value for name, value in candidate.theta.items()}
        return candidate.replace(theta=theta)


def _twice(site) -> list[int]:
    return [*range(site.units)] * 2


def _order(leaf) -> np.ndarray:
    """Positions of the site's channels at a leaf, those of one unit together."""
    return leaf.channels.index.reshape(-1)


def _mean_of_halves(twice: Path, leaf, values):
    """The mean of both children of every unit, in the order of `_order`."""
    plus, minus = np.split(twice.maps[leaf.tensor].index, 2)
    return 0.5 * (take(values, plus.reshape(-1)) + take(values, minus.reshape(-1)))


def _children(candidate: Candidate, sign: float, weights, paths):
    """One child of every unit, by the parents' weights and path variables: `sign` tells which."""
    site = candidate.site
    for unit in range(site.units):
        fan_in = {
            name: (value[unit] + sign * candidate.theta[name][unit]).astype("float32")
            for name, value in weights.items()
        }
        yield NewUnit(
            source=unit,
            fan_in=fan_in,
            path=paths[unit],
            fan_out=(0.5,) * len(site.consumers),
            gradient_scale=0.5,
        )


def _unit_paths(site) -> list[tuple]:
    """Per unit, its variables along the path: children keep those of their parents."""
    path, own = Path(site, site.units), len(site.producers)
    live = path.live_variables(range(site.units))
    found: list[list] = [[] for _ in range(site.units)]
    for step, variables in zip(path.steps[own:], live[own:], strict=True):
        apart = {name: _by_unit(path, step, name, value) for name, value in variables.items()}
        for unit, mine in enumerate(found):
            mine.append({name: values[unit] for name, values in apart.items()})
    return [tuple(mine) for mine in found]


def _by_unit(path: Path, step, name: str, value) -> list[np.ndarray]:
    """A variable of a step, taken apart by units."""
    index = step.view.variable_map(name, path.maps[step.source]).index
    axis = step.layer.variable_axes[name].channel
    return [np.take(np.asarray(value, dtype="float32"), where, axis) for where in index]
