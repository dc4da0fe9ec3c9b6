"""Firefly descent: the network is over-grown a little, trained so, and the best units are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrow._checks import require_whole
from tfgrow.capture.batches import forever
from tfgrow.capture.capture import observe
from tfgrow.capture.checks import check_loss
from tfgrow.estimator import GaussNewtonEstimator
from tfgrow.morphisms.base import Candidate, Group, Perturbed, perturb_all
from tfgrow.morphisms.registry import candidates as make_candidates
from tfgrow.morphisms.weights import typical_scale
from tfgrow.strategies.base import Room
from tfgrow.strategies.ranked import Ranked
from tfgrow.strategies.stacked import Rows, samples_of, with_theta


class Firefly(Ranked):
    """Over-grows the network by splits and new units, trains them, and keeps those that gain most.

    Source: Wu, Liu, Stone, Liu 2020, "Firefly Neural Architecture Descent", arXiv 2102.08574. In
    the neighbourhood of the network, all units may be split and some are new everywhere:

        sigma(theta_i)  ->  1/2 sigma(theta_i + eps_i delta_i) + 1/2 sigma(theta_i - eps_i delta_i)
        0               ->  eps_j sigma(delta_j),        |delta| <= 1,  |eps| <= epsilon

    1. A few steps of gradient descent on the loss of that over-grown network find eps and delta,
       the old weights staying as they are.
    2. To first order in eps the loss changes by `sum_i eps_i s_i`, with `s_i` the mean of its
       gradient with respect to eps_i on the way from 0 to what step 1 found, the other eps staying
       there (the gradient at 0 is none for a split). The units of the largest |s_i| are kept, as
       many as the budget allows, with `eps_i = -epsilon sign(s_i)`. Each unit counts alike,
       whatever it costs.

    What is done differently: nothing is built. What the splits and new units change is added to the
    tensors of the running network, so that only this much of their interplay is not seen: how those
    of one layer change what those of a later one do (of order eps^2), and what comes round to its
    own site in a residual stream. No eps is trained: all are `epsilon`, and a new unit's outgoing
    weights, within that bound, are trained with either sign. So the units of the lowest s_i are
    kept, as in the authors' code, just as they were trained, and none that raises the loss. The
    gates multiply what the units change, which for a split is another way from 0 to 1 between the
    same ends, and all go up together, which the s_i of all units then tell the whole change of the
    loss by. Descent goes by the direction of each unit's gradient, and back into the bounds after
    each step, where the paper has penalties. Deeper networks, the paper's other way to grow, are
    left out.

    Args:
      epsilon: size of what is grown: delta of a split relative to the unit's weights, outgoing
        weights of a new unit relative to what is usual.
      new_units: units to come that are tried at every site, beside the splits.
      steps: of gradient descent, a batch each.
      learning_rate: their length, relative to the largest delta.
      points: at which the gradient is taken on the way.
      **kwargs: see `tfgrow.strategies.Strategy`. `batches` are those that it is taken on.

    Example:

    >>> import keras, numpy as np, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "tanh", name="a"), keras.layers.Dense(1)]))
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    >>> plan = tfgrow.strategies.Firefly(growth_per_step=2, seed=0).propose_plan(
    ...     model, (x, np.sin(x.sum(axis=1, keepdims=True))))
    >>> plan.widths, plan.estimated_change < 0
    ({'a': (3, 5)}, True)
    """

    def __init__(
        self,
        objective: Any = "val_loss",
        *,
        epsilon: float = 0.1,
        new_units: int = 4,
        steps: int = 16,
        learning_rate: float = 0.2,
        points: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(objective, **kwargs)
        for name, value in (("epsilon", epsilon), ("learning_rate", learning_rate)):
            if not (isinstance(value, (int, float)) and 0 < value < np.inf):
                raise ValueError(f"{name} must be a finite number > 0. Found: {value!r}")
        require_whole("new_units", new_units, least=0, optional=False)
        require_whole("steps", steps, optional=False)
        require_whole("points", points, optional=False)
        self.epsilon = epsilon
        self.new_units = new_units
        self.steps = steps
        self.learning_rate = learning_rate
        self.points = points

    def ranked(self, room: Room, sites: Sequence[str]):
        kinds = ("split", "add") if self.new_units else ("split",)
        every = make_candidates(room.model, kinds, sites, self.new_units or 1, room.seed)
        trained = OverGrown(room.model, every).trained(
            room.data.learn, self.epsilon, self.steps, self.learning_rate
        )
        slopes = OverGrown(room.model, trained).slopes(room.data.learn, self.points)
        return trained, slopes

    def estimated(self, room: Room, chosen: Sequence[Candidate]) -> float:
        """The change of the real loss, on batches that nothing was trained on."""
        return OverGrown(room.model, chosen).change(room.data.score)


class OverGrown(GaussNewtonEstimator):
    """A model with all of some candidates at once, as far as their gates are open.

    Args:
      model: the live model.
      candidates: its splits and new units.
    """

    def __init__(self, model: keras.Model, candidates: Sequence[Candidate]):
        super().__init__(model, curvature="none")
        self._candidates = candidates
        self._groups, self._positions = self._group(candidates)
        self._thetas = [
            {name: tf.constant(value) for name, value in group.theta.items()}
            for group in self._groups
        ]
        self._gates = tf.ones(len(candidates))

    def trained(self, dataset, epsilon: float, steps: int, learning_rate: float) -> list[Candidate]:
        """The candidates after descent on the loss with all gates open.

        Args:
          dataset: anything `model.fit` takes, with targets; repeated if it is too short.
          epsilon: bound on the sizes of what is grown, relative to the natural ones.
          steps: number of steps, a batch each.
          learning_rate: their length relative to the bound; it falls linearly to none.
        """
        layout = [_trained_rows(group, epsilon) for group in self._groups]
        every = [
            tf.constant(rows.pack(group.theta))
            for group, mine in zip(self._groups, layout, strict=True)
            for rows in mine
        ]
        deltas = [_within_bound(delta) for delta in every]
        stream, descend = forever(dataset), None
        for number in range(steps):
            rate = tf.constant(learning_rate * (1 - number / steps), tf.float32)
            inputs = (self._arranged(next(stream)), deltas, rate)
            descend = descend or self._trace(
                lambda batch, rows, rate: self._descend(batch, layout, rows, rate), inputs
            )
            deltas, loss = descend(*inputs)
            check_loss(loss)
        return with_theta(self._candidates, self._positions, _unpacked(layout, deltas))

    def slopes(self, dataset, points: int) -> np.ndarray:
        """Gradient of the mean loss with respect to each gate, in the order of the candidates.

        It is the mean over so many points on the way from all gates shut to all of them open.

        Args:
          dataset: finite.
          points: number of points.
        """
        levels = tf.constant((np.arange(points) + 0.5) / points, tf.float32)

        def along(batch, seed, thetas):
            del seed
            perturbed = self._perturbed(batch, thetas, fresh=True)

            def at(level):
                gates = level * self._gates
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(gates)
                    losses = self._losses(batch, thetas, perturbed, gates)
                return tape.gradient(losses, gates)

            slopes = tf.map_fn(at, levels, fn_output_signature=tf.float32)
            return tf.reduce_mean(slopes, axis=0), samples_of(batch)

        slopes, count = self._sum(dataset, along, self._thetas)
        return (slopes / count)[np.argsort(np.concatenate(self._positions))]

    def change(self, dataset) -> float:
        """Change of the mean loss by opening all gates."""

        def both(batch, seed, thetas):
            del seed
            perturbed = self._perturbed(batch, thetas, fresh=False)
            after = self._losses(batch, thetas, perturbed, self._gates)
            before, count = self._passes.loss(batch)
            return tf.reduce_sum(after) - before, count

        change, count = self._sum(dataset, both, self._thetas)
        return float(change / count)

    def _descend(self, batch, layout, deltas, rate):
        """One step, and the mean loss before it."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(deltas)
            thetas = _unpacked(layout, deltas)
            perturbed = self._perturbed(batch, thetas, fresh=True)
            loss = tf.reduce_mean(self._losses(batch, thetas, perturbed, self._gates))
        gradients = tape.gradient(loss, deltas)
        moved = [
            _within_bound(delta - rate * tf.math.divide_no_nan(gradient, _size(gradient)))
            for delta, gradient in zip(deltas, gradients, strict=True)
        ]
        return moved, loss

    def _perturbed(self, batch, thetas, fresh: bool) -> list[Perturbed]:
        """What the candidates change; with statistics of the batch itself if `fresh`."""
        return perturb_all(observe(self._graph, batch[0]), self._groups, thetas, fresh)

    def _losses(self, batch, thetas, perturbed, gates):
        """Each sample's loss `[N]`, the candidates opened by their gates `[C]`, by groups."""
        everywhere = tf.tile(gates[None], [tf.shape(batch[2][0])[0], 1])
        return self._passes.carried(batch, self._groups, thetas, perturbed, everywhere)


def _trained_rows(group: Group, epsilon: float) -> list[Rows]:
    """What is trained of a group, in units of the largest it may be: what is handed on is small."""
    if not group.morphism.solved:
        return [Rows(group, {name: epsilon * scale for name, scale in group.scales.items()})]
    outgoing = {
        f"phi/{index}": np.full(len(group.units), epsilon * typical_scale(consumer))
        for index, consumer in enumerate(group.site.consumers)
    }
    return [Rows(group, group.scales), Rows(group, outgoing)]


def _unpacked(layout: Sequence[Sequence[Rows]], deltas: Sequence) -> list[dict[str, Any]]:
    """The parameters by group."""
    left = iter(deltas)
    return [
        {name: value for rows in mine for name, value in rows.unpack(next(left)).items()}
        for mine in layout
    ]


def _size(rows):
    """Root mean square of each row, `[n, 1]`."""
    return tf.sqrt(tf.reduce_mean(rows**2, axis=1, keepdims=True))


def _within_bound(rows):
    return rows / tf.maximum(_size(rows), 1.0)
