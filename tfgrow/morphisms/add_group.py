"""Add a group: several new units at once, with one closed form for all their outgoing weights.

Single new units are each the best alone: what two of them do about the same error is not added up.
Here Q is that of all their outgoing weights together, so that each does what the others leave.

Source: as `morphisms/add.py`; joint outgoing weights as in Verbockhaven et al. 2024 (TINY).

Layouts: as there, with an axis `[n, TOGETHER, ...]` for the units of a candidate.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgrow.morphisms.add import Add
from tfgrow.morphisms.base import Candidate, Perturbed, single_units
from tfgrow.types import Cost, WidthEdit

TOGETHER = 4
"""Units of a group."""

DENSE_LIMIT = 2304
"""Above so many outgoing weights of a group, Q is Kronecker-factored.

Larger than for single units, for there is one candidate per site, and the factored Q knows nothing
of what units at different positions do to the same logits: before a global pooling, groups came out
hundreds of times too long (VGG on CIFAR-10: +18 estimated where the whole Q gives -0.04).
"""


class AddGroup(Add):
    """Adds several units at once. See the module's docstring."""

    name = "add_group"
    units = TOGETHER
    together = TOGETHER
    dense_limit = DENSE_LIMIT

    def candidates(self, site, *, new_units, seed):
        del new_units
        singles = super().candidates(site, new_units=self.together, seed=seed)
        return [
            Candidate(
                site, self.name, 0, _stacked(singles, "theta"), _stacked(singles, "state"), Cost()
            )
        ]

    def perturb(self, capture, group, theta, responses, fresh):
        found = super().perturb(capture, group, self._by_unit(theta), responses, fresh)
        moments = {
            name: tf.reshape(value, (-1, self.together, *value.shape[1:]))
            for name, value in found.moments.items()
        }
        return Perturbed(found.values, moments)

    def covectors(self, capture, group, theta, perturbed):
        return super().covectors(capture, group, self._by_unit(theta), perturbed)

    def tangents(self, group, theta, perturbed):
        return super().tangents(group, self._by_unit(theta), perturbed)

    def scalars(self, group, covectors, perturbed):
        by_unit = super().scalars(group, covectors, perturbed)
        parts = tf.reshape(by_unit, (by_unit.shape[0], -1, len(group.units), self.together))
        return tf.reduce_sum(parts, axis=-1)

    def slopes(self, group, weights, covectors):
        return super().slopes(group, tf.repeat(weights, self.together, axis=2), covectors)

    def edit(self, candidate):
        units = []
        for number in range(self.together):
            theta = {name: value[number] for name, value in candidate.theta.items()}
            state = {name: value[number] for name, value in candidate.state.items()}
            units += super().edit(candidate.replace(theta=theta, state=state)).appended
        return WidthEdit(candidate.site, {}, tuple(units))

    def _by_unit(self, theta):
        return {name: single_units(self, value) for name, value in theta.items()}


def _stacked(singles, what: str) -> dict[str, np.ndarray]:
    parts = [getattr(candidate, what) for candidate in singles]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}
