"""Splitting steepest descent: units are split along the lowest curvature of what they hand on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrow._checks import require_whole
from tfgrow.capture.batches import forever
from tfgrow.estimator import GaussNewtonEstimator
from tfgrow.morphisms.base import Candidate, perturb_all
from tfgrow.morphisms.registry import candidates as make_candidates
from tfgrow.oracle.data import larger_batches
from tfgrow.passes import covectors_of, objective, taps_of
from tfgrow.strategies.base import Room
from tfgrow.strategies.ranked import Ranked
from tfgrow.strategies.stacked import Rows, samples_of, with_theta


class Splitting(Ranked):
    """Splits the units whose splitting matrices have the lowest eigenvalues, along their vectors.

    Source: Liu, Wu, Wang 2019, "Splitting Steepest Descent for Growing Neural Architectures", arXiv
    1910.02366. Unit i hands on `sigma_i(theta, x)`, with theta its incoming weights and bias. Split
    into `theta + eps v` and `theta - eps v`, each with half of the outgoing weights, it changes the
    loss by `eps^2/2 v'S_i v + O(eps^3)`, with the splitting matrix

        S_i = E[dloss/dsigma_i * hessian_theta sigma_i(theta, x)].

    The best v is the eigenvector of the lowest eigenvalue. The units of the lowest eigenvalues of
    all sites are split, as many as the budget allows, and none whose eigenvalue is not negative.
    The loss enters by its gradient alone: its own curvature plays no part.

    What is done differently: no matrix is formed. S v is the gradient of what a split changes to
    first order, and a power iteration on `c - S` finds v, one batch for each of its steps. (Wang et
    al. 2019, arXiv 1910.03103, form none either: they descend the Rayleigh quotient `v'S v / v'v`
    by stochastic gradients.) eps is not one number but relative to each unit's weights. A ReLU has
    no second derivative, and the authors' code takes that of a softplus instead; here S v is a
    difference at the distance eps, which smoothes as far as the step goes and no further.

    Args:
      step: eps, relative to the length of the unit's weights. Small, as all holds to second order
        in it; but of a ReLU only the samples within it of the kink tell anything.
      iterations: steps of the power iteration.
      **kwargs: see `tfgrow.strategies.Strategy`. `batches` are those that S is the mean over.

    Example:

    >>> import keras, numpy as np, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "tanh", name="a"), keras.layers.Dense(1)]))
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    >>> plan = tfgrow.strategies.Splitting(growth_per_step=1, seed=0).propose_plan(
    ...     model, (x, np.sin(x.sum(axis=1, keepdims=True))))
    >>> [c.morphism for c in plan.candidates], plan.estimated_change < 0
    (['split'], True)
    """

    def __init__(
        self,
        objective: Any = "val_loss",
        *,
        step: float = 0.1,
        iterations: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(objective, **kwargs)
        if not (isinstance(step, (int, float)) and 0 < step < np.inf):
            raise ValueError(f"step must be a finite number > 0. Found: {step!r}")
        require_whole("iterations", iterations, optional=False)
        self.step = step
        self.iterations = iterations

    def ranked(self, room: Room, sites: Sequence[str]):
        every = make_candidates(room.model, "split", sites=sites, seed=room.seed)
        splits = Splits(room.model, every, self.step)
        # The mean of noisy products has another lowest eigenvector than their product.
        directions = splits.steepest(larger_batches(room.data.learn), self.iterations)
        return splits.along(directions), splits.curvatures(directions, room.data.learn)

    def estimated(self, room: Room, chosen: Sequence[Candidate]) -> float:
        """To first order, on batches that the directions were not found on."""
        estimator = GaussNewtonEstimator(room.model, curvature="none")
        return estimator.joint_change(chosen, room.data.score)


class Splits(GaussNewtonEstimator):
    """The splitting matrices of some units, by what they make of directions.

    Directions are a list of `[n, d]`, a row per candidate of a group, of the lengths of the steps.

    Args:
      model: the live model.
      candidates: its splits.
      step: their length, relative to the units' weights.
    """

    def __init__(self, model: keras.Model, candidates: Sequence[Candidate], step: float):
        super().__init__(model, curvature="none")
        self._candidates = candidates
        self._groups, self._positions = self._group(candidates)
        self._rows, self._lengths = [], []
        for group in self._groups:
            natural = Rows(group, group.scales).scale
            self._lengths.append(step * np.linalg.norm(natural, axis=1, keepdims=True))
            self._rows.append(Rows(group, dict.fromkeys(group.scales, np.ones(len(natural)))))

    def steepest(self, dataset, iterations: int) -> list:
        """The directions of the lowest eigenvalues, from those of the candidates on."""
        start = [
            rows.pack(group.theta) for rows, group in zip(self._rows, self._groups, strict=True)
        ]
        directions = [
            _of_length(length, tf.constant(row), row)
            for length, row in zip(self._lengths, start, strict=True)
        ]
        shifts = [tf.zeros(length.shape) for length in self._lengths]
        stream, turn = forever(dataset), None
        for _ in range(iterations):
            inputs = (self._arranged(next(stream)), directions, shifts)
            turn = turn or self._trace(self._turn, inputs)
            directions, shifts = turn(*inputs)
        return directions

    def curvatures(self, directions: Sequence, dataset) -> np.ndarray:
        """`v'S v` of the unit vector v along each candidate's direction, in their order."""

        def products(batch, seed, rows):
            del seed
            pairs = zip(rows, self._products(batch, rows), strict=True)
            every = [tf.reduce_sum(v * product, axis=1) for v, product in pairs]
            return tf.concat(every, axis=0), samples_of(batch)

        total, count = self._sum(dataset, products, list(directions))
        squares = np.concatenate(self._lengths)[:, 0].astype("float64") ** 2
        return (total / count / squares)[np.argsort(np.concatenate(self._positions))]

    def along(self, directions: Sequence) -> list[Candidate]:
        """The candidates with these directions for theta."""
        thetas = [rows.unpack(v) for rows, v in zip(self._rows, directions, strict=True)]
        return with_theta(self._candidates, self._positions, thetas)

    def _turn(self, batch, directions, shifts):
        """One step of the power iteration on `shift - S`.

        The shift is the longest that S has made a unit vector so far: were it too short for the
        lowest eigenvalue to be the one that grows, it would be the highest, and the shift with it.
        """
        turned, longest = [], []
        for v, product, shift, length in zip(
            directions, self._products(batch, directions), shifts, self._lengths, strict=True
        ):
            product = product / samples_of(batch)
            stretched = tf.norm(product, axis=1, keepdims=True) / length
            longest.append(tf.maximum(shift, stretched))
            turned.append(_of_length(length, longest[-1] * v - product, v))
        return turned, longest

    def _products(self, batch, directions) -> list:
        """Sums over a batch of S times the directions: gradients of the first-order changes."""
        captured = self._passes.capture(batch, None, taps_of(self._groups))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(directions)
            thetas = [rows.unpack(v) for rows, v in zip(self._rows, directions, strict=True)]
            perturbed = perturb_all(captured, self._groups, thetas, fresh=False)
        covectors = covectors_of(captured, self._groups, thetas, perturbed)
        _, slopes = objective(self._groups, covectors, perturbed)
        values = [effect.values for effect in perturbed]
        return tape.gradient(values, directions, output_gradients=slopes)


def _of_length(length, rows, otherwise):
    """Rows brought to a length; those of zero are the other ones."""
    size = tf.norm(rows, axis=1, keepdims=True)
    return tf.where(size > 0, length * tf.math.divide_no_nan(rows, size), otherwise)
