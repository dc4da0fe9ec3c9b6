"""Variables of new units along a site's path, and the statistics they are made from.

Statistics are kept in a candidate's state as `{who}/{step}/mean` and `{who}/{step}/square`, each
`[blocks]`, where `step` counts `Path.steps` and `who` tells the units of one candidate apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfgrow.capture.path import Path
from tfgrow.layers.growable import Moments
from tfgrow.layers.joins import Join
from tfgrow.morphisms.base import Candidate


class Observer:
    """Collects the batch's moments where a path's layers need them: `seen[name] [n, blocks]`.

    The batch may be several of equal size, one behind the other, of units that `who` names.
    """

    def __init__(self, path: Path, who: Sequence[str]):
        self.seen: dict[str, tf.Tensor] = {}
        self._path = path
        self._who = who

    def __call__(self, number: int, values) -> None:
        source = self._path.steps[number].source
        parts = tf.reshape(tf.stop_gradient(values), (len(self._who), -1, values.shape[-1]))
        for name, moment in (("mean", parts), ("square", parts**2)):
            by_unit = self._path.by_unit(source, tf.reduce_mean(moment, axis=1))
            for who, value in zip(self._who, tf.unstack(by_unit), strict=True):
                self.seen[f"{who}/{number}/{name}"] = value

    def keep(self, number: int, moments: Moments) -> None:
        """Notes moments `[size]` that are known already, of the only ones there are."""
        (who,), source = self._who, self._path.steps[number].source
        mean, variance = tf.stop_gradient(moments.mean), tf.stop_gradient(moments.variance)
        for name, moment in (("mean", mean), ("square", variance + mean * mean)):
            self.seen[f"{who}/{number}/{name}"] = self._path.by_unit(source, moment)


def state_moments(state: Mapping[str, np.ndarray], who: str, number: int) -> Moments | None:
    """The moments `[..., blocks]` kept in a state, or None if they were never measured."""
    mean = state.get(f"{who}/{number}/mean")
    if mean is None:
        return None
    # float32 sums of squares can fall short of the squared mean by rounding
    variance = tf.maximum(state[f"{who}/{number}/square"] - mean**2, 0.0)
    return Moments(mean, variance)


def child_path(candidate: Candidate, who: str) -> tuple[dict[str, np.ndarray], ...]:
    """Path variables of a unit that descends from the candidate's unit."""
    return _unit_path(candidate, who, "child_variables", candidate.unit)


def newborn_path(candidate: Candidate, who: str, template: int):
    """Path variables of a unit that descends from none; `template` lends what has no default."""
    return _unit_path(candidate, who, "newborn_variables", template)


def _unit_path(candidate, who, method, unit):
    site = candidate.site
    path = Path(site, 1)
    live = path.live_variables([unit])
    result = []
    for number, (step, variables) in enumerate(zip(path.steps, live, strict=True)):
        made = {}
        if not isinstance(step.view, Join):
            moments = _scaled_moments(candidate.state, who, number)
            made = getattr(step.view, method)(variables, moments)
        result.append({name: np.asarray(value, dtype="float32") for name, value in made.items()})
    # the producers' own activations, which come first, are no steps of the site
    return tuple(result[len(site.producers) :])


def _scaled_moments(state, who: str, number: int) -> Moments | None:
    """Moments at the scale alpha of the guard: between the undisturbed unit's and the child's."""
    child = state_moments(state, who, number)
    now = state_moments(state, "now", number)
    if child is None or now is None:
        return child
    alpha = float(state.get("alpha", 1.0))
    return Moments(
        now.mean + alpha * (child.mean - now.mean),
        now.variance + alpha * (child.variance - now.variance),
    )


def stacked_path_variables(
    path: Path, templates: Sequence[int], moments_at: Callable[[int], Moments | None]
):
    """Newborn variables of a whole group, in the layout of its path."""
    live = path.live_variables(templates)
    result = []
    for number, (step, variables) in enumerate(zip(path.steps, live, strict=True)):
        moments = moments_at(number)
        if moments is not None:
            moments = Moments(
                path.lay_out(step.source, moments.mean),
                path.lay_out(step.source, moments.variance),
            )
        made = (
            {} if isinstance(step.view, Join) else step.view.newborn_variables(variables, moments)
        )
        result.append(made)
    return tuple(result)
