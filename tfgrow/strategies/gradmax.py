"""GradMax: new units whose incoming weights get the largest gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfgrow.capture.path import needs_moments
from tfgrow.graph.sites import Site
from tfgrow.strategies.base import Room
from tfgrow.strategies.linear_units import (
    Directions,
    LinearStrategy,
    LinearUnits,
    captures,
    incoming_norm,
)

NEGLIGIBLE = 1e-4
"""Singular values under this share of a site's largest are none: rounding, or no gradient."""


class GradMax(LinearStrategy):
    """Outgoing weights that give the incoming ones the largest gradient; these are next to zero.

    Source: Evci, van Merrienboer, Unterthiner, Vladymyrov, Pedregosa 2022, "GradMax: Growing Neural
    Networks using Gradient Information", arXiv 2201.05125. With `h` what the producer reads and `d`
    the loss gradient at the consumer's response, a unit of outgoing weights `b` and no incoming
    ones has the gradient `M b` at these, `M = E[h d']`, where the activation has the derivative 1
    at zero. Of k units with orthogonal outgoing weights of a norm c, those along M's first right
    singular vectors `b_i` have the largest gradient; its square is the sum of `(c s_i)^2` over the
    singular values. c is the mean of the norms of the site's units' outgoing weights, as in the
    authors' code; its configurations for images take half of that (for VGG, 0.5 itself).

    What differs:

    * Incoming weights are not zero, for there ReLU has no gradient in TensorFlow (the authors' own
      ReLU has 1), but `tiny` relative to those of a usual unit, along the first gradient step:
      `-a_i`, the other singular vector. So the function is nearly kept. Biases are zero.
    * M is that of the path linearised, see `tfgrow/strategies/linear_units.py`: the gradient of a
      ReLU unit, which fires on half of the samples, counts half.
    * Where the path has a BatchNormalization, which would blow up tiny responses to usual ones, the
      incoming weights are smaller by the root of its epsilon: in either mode it then divides by
      that root only, hands on as little as without it, and the unit grows with its weights.
      Gradients are larger by the inverse of that root than M says; it counts for nothing in the
      choice of sites, since it is gone as soon as the unit has grown.
    * Which layers grow, and by how much, the authors' code is told beforehand (one after the other,
      or all at once): here those do whose next units' gradients, `(c s_i)^2`, are the largest per
      parameter. A convolution before a dense layer is no exception; there, the authors' code adds
      units at random.

    Sites whose units would not be silent without incoming weights (a sigmoid, say) do not grow.

    Args:
      objective: name of the metric that ranks the trials.
      tiny: size of the incoming weights relative to those of the site's units.
      **kwargs: see `tfgrow.strategies.Strategy`; `batches` are those that M is measured on.

    Example:

    >>> import keras, numpy as np, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu", name="a"), keras.layers.Dense(2)]))
    >>> model.compile("sgd", "mse")
    >>> rng = np.random.default_rng(0)
    >>> data = rng.normal(size=(64, 4)), rng.normal(size=(64, 2))
    >>> tfgrow.strategies.GradMax(growth_per_step=2, seed=0).propose_plan(model, data).widths
    {'a': (3, 5)}
    """

    biases = False

    def __init__(self, objective="val_loss", *, tiny: float = 1e-3, **kwargs) -> None:
        super().__init__(objective, **kwargs)
        if not (isinstance(tiny, (int, float)) and 0 < tiny < np.inf):
            raise ValueError(f"tiny must be a finite number > 0. Found: {tiny!r}")
        self.tiny = tiny

    def directions(self, room: Room, units: Sequence[LinearUnits]) -> list[Directions]:
        return [
            self._best(one, matrix)
            for one, matrix in zip(units, mean_gradients(room, units), strict=True)
        ]

    def _best(self, units: LinearUnits, matrix: np.ndarray) -> Directions:
        incoming, values, outgoing = np.linalg.svd(matrix, full_matrices=False)
        count = int(np.sum((values > NEGLIGIBLE * values[0]) & (values > 0)))
        norm = outgoing_norm(units.site)
        size = _size(units.site, self.tiny)
        every = Directions((norm * values) ** 2, -size * incoming.T, norm * outgoing)
        return every.first(count)


def mean_gradients(room: Room, units: Sequence[LinearUnits]) -> list[np.ndarray]:
    """M of some sites, `[A, B]` each: see `tfgrow/strategies/linear_units.py`."""
    sums = [np.zeros((one.fan_in, one.fan_out)) for one in units]
    samples = 0
    for captured, count in captures(room, units, room.data.learn):
        samples += count
        for one, total in zip(units, sums, strict=True):
            for part in one.slices(captured):
                total += one.gradients(part, one.basis(part))
    return [total / samples for total in sums]


def outgoing_norm(site: Site) -> float:
    """Mean norm of the outgoing weights of a site's units; 1 where all of them are zero."""
    squares = np.zeros(site.units)
    for leaf in site.leaves:
        for node in leaf.consumers:
            layer = node.operation
            axis = layer.variable_axes[layer.kernel_name].fan_in
            kernel = np.asarray(getattr(layer, layer.kernel_name), dtype="float64")
            rows = np.moveaxis(kernel, axis, 0)[leaf.channels.index]
            squares += (rows**2).reshape(site.units, -1).sum(axis=1)
    return float(np.sqrt(squares).mean()) or 1.0


def _size(site: Site, tiny: float) -> float:
    """The norm of a new unit's incoming weights; smaller where it is normalised, see `GradMax`."""
    epsilons = [getattr(step.layer, "epsilon", 1.0) for step in site.steps if needs_moments(step)]
    return tiny * incoming_norm(site) * float(np.sqrt(min([1.0, *epsilons])))
