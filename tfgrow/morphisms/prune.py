"""Prune: a unit goes, and the others stand in for it.

Its values at the consumers become `sum_j share_j a_j + offset`, a combination of the site's other
units folded into the consumers' weights (W_j += share_j W_c), so that the perturbation at its
channel is D = sum_j share_j a_j + offset - a_c. The estimate is quadratic in the shares, and they
have a closed form: least squares in the Gauss-Newton metric, with the gradient's pull.

Source: in the spirit of Optimal Brain Surgeon (Hassibi & Stork 1993), for whole units, in the
metric of Lawton et al., arXiv 2411.05855.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgrow.capture.execute import tensor_tap
from tfgrow.capture.path import Path, apart
from tfgrow.curvature.normal import cross_damping
from tfgrow.curvature.stand_in import change, solve, spread_out, stand_in_sums, zero_sums
from tfgrow.graph.sites import Site
from tfgrow.morphisms.base import AtInputs, Candidate, Perturbed
from tfgrow.morphisms.weights import site_fan_in
from tfgrow.types import Cost, RemovedUnit, WidthEdit

AT_ONCE = 0.25
"""Share of a site's units that may go at once, and are therefore not to stand in for each other.

Mean real change of a VGG's loss by a removal in its first four layers (CIFAR-10): 0.165, 0.171,
0.044, 0.030 at a half, 0.133, 0.143, 0.027, 0.019 at a quarter.
"""


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

    def scale(self, site, units):
        del site, units
        return {}

    def perturb(self, capture, group, theta, responses, fresh):
        del responses, fresh
        if "share" not in theta:  # not solved yet, and nothing in it is improved by gradient
            return Perturbed({}, {})
        itself = _itself(group)
        v = theta["share"] * (1.0 - itself) - itself
        offset = tf.reshape(theta["offset"], (-1, 1))
        return Perturbed(
            {
                leaf.tensor: group.path.lay_out(
                    leaf.tensor,
                    tf.linalg.matmul(tf.convert_to_tensor(v), _by_unit(capture, leaf)) + offset,
                )
                for leaf in group.site.leaves
            },
            {},
        )

    def equations(self, capture, group, perturbed):
        at_units = self.covectors(capture, group, {}, perturbed)
        values, covectors = [], []
        for leaf in group.site.leaves:
            live, blocks = _by_unit(capture, leaf), leaf.channels.blocks
            flat = tf.reshape(live, (tf.shape(live)[0], -1, group.site.units, blocks))
            ones = tf.ones_like(flat[:, :, :1])
            values.append(tf.concat([flat, ones], axis=2))
            mine = group.path.by_unit(leaf.tensor, at_units[leaf.tensor])
            shape = (mine.shape[0], tf.shape(flat)[0], -1, len(group.units), blocks)
            covectors.append(tf.reshape(mine, shape))
        return stand_in_sums(values, covectors)

    def no_equations(self, group):
        return zero_sums(len(group.units), group.site.units)

    def solve(self, group, sums, damping):
        most = int(AT_ONCE * group.site.units)
        free = spread_out(sums, _free(group), group.units, damping, most)
        v = tf.cast(solve(sums, free, group.units, damping), tf.float32)
        share, offset = v[:, :-1], v[:, -1]
        return {"share": share * (1.0 - _itself(group)), "offset": offset}

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


def _by_unit(capture, leaf):
    """What all of the site's units hand to a leaf's consumers: `[N, ..., units, blocks]`."""
    return apart(capture.values[tensor_tap(leaf.tensor)], leaf.channels)


def _itself(group) -> np.ndarray:
    return np.eye(group.site.units, dtype="float32")[group.units]


def _free(group) -> np.ndarray:
    """Which entries of v may be used, `[units + 1]`: every unit's, and the constant if it can."""
    free = np.ones(group.site.units + 1, dtype=bool)
    free[-1] = all(layer.absorbs_constant for layer in group.site.consumers)
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
