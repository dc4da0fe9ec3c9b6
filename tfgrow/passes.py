"""The estimate's passes over a batch, as functions to be traced once per model shape.

Each pass captures the batch once and serves all groups of candidates, however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfgrow.capture.capture import Capture, Head, capture, observe, push_forward
from tfgrow.curvature.columns import weigh_columns, weigh_values
from tfgrow.curvature.loss_head import LossHead
from tfgrow.curvature.normal import add_sums, scale_sums
from tfgrow.graph.nodes import Graph
from tfgrow.morphisms.base import Group

FORGET = 0.9
"""How much of the earlier batches' normal equations each learning step keeps."""

LEARNING_DAMPING = 0.1
"""Relative damping of the closed forms while learning; the final one is chosen by crossing halves."""

Arrays = Mapping[str, Any]


class Passes:
    """The passes for one model, loss and curvature."""

    def __init__(self, graph: Graph, head: Head, loss: LossHead, curvature: str, draws: int):
        self._graph = graph
        self._head = head
        self._loss = loss
        self._curvature = curvature
        self._draws = draws

    def capture(self, batch, seed, taps) -> Capture:
        """One batch with gradient and columns at the taps."""
        x, y, weight = batch
        empirical = self._curvature == "empirical"

        def columns(logits):
            factors = self._loss.factors(y, logits, self._curvature, self._draws, seed)
            return weigh_columns(factors, weight)

        def unweigh(gradient):
            shape = (-1, *[1] * (len(gradient.shape) - 1))
            return tf.math.divide_no_nan(gradient, tf.reshape(tf.sqrt(weight), shape))

        return capture(
            self._graph,
            self._head,
            x,
            taps,
            gradient_of=lambda logits: weigh_values(self._loss.gradient(y, logits), weight),
            columns_of=columns,
            reuse_gradient=unweigh if empirical else None,
        )

    def loss(self, batch) -> Any:
        """Sum of the weighted losses of a batch, and the number of its samples."""
        x, y, weight = batch
        logits = observe(self._graph, x).values[self._head.tap]
        return tf.reduce_sum(self._loss.per_sample(y, logits) * weight), _count(weight)

    def scalars(self, batch, seed, groups: Sequence[Group], thetas: Sequence[Arrays]) -> Any:
        """Sums over a batch of `(loss, linear [C], gram [C, C], samples)` for all candidates."""
        captured = self.capture(batch, seed, _taps(groups))
        parts = [
            group.morphism.scalars(
                captured, group, theta, group.morphism.perturb(captured, group, theta, fresh=False)
            )
            for group, theta in zip(groups, thetas, strict=True)
        ]
        linear, *columns = [tf.concat(same, axis=1) for same in zip(*parts, strict=True)]
        gram = tf.add_n([tf.matmul(q, q, transpose_a=True) for q in columns])
        _, y, weight = batch
        losses = self._loss.per_sample(y, captured.values[self._head.tap]) * weight
        return tf.reduce_sum(losses), tf.reduce_sum(linear, 0), gram, _count(weight)

    def joint(self, batch, groups: Sequence[Group], thetas: Sequence[Arrays]) -> Any:
        """Sums over a batch of the joint change by forward accumulators, and its samples."""
        x, y, weight = batch
        captured = observe(self._graph, x)
        tangents: dict = {}
        for group, theta in zip(groups, thetas, strict=True):
            perturbed = group.morphism.perturb(captured, group, theta, fresh=False)
            for tap, value in group.morphism.tangents(group, theta, perturbed).items():
                tangents[tap] = tangents[tap] + value if tap in tangents else value
        logits, pushed = push_forward(self._graph, self._head, x, tangents)
        slope = self._loss.gradient(y, logits) * pushed
        slope = tf.reduce_sum(slope, axis=list(range(1, len(slope.shape))))
        change = slope + 0.5 * self._loss.quadratic(y, logits, pushed)
        return tf.reduce_sum(change * weight), _count(weight)

    def learn(self, batch, seed, groups, thetas, adam, sums, rate) -> Any:
        """One learning step of all candidates on a batch.

        Args:
          batch: `(x, y, weight)`.
          seed: of the sampled columns.
          groups: all groups.
          thetas: their parameters and state, one dict per group.
          adam: per group, the moments of the learned parameters' gradients, and the step count.
          sums: per group, the decayed normal equations of earlier batches.
          rate: step size relative to the weights' natural size; at 0 nothing moves.

        Returns:
          `(thetas, adam, sums of this batch, decayed sums, moments, objective)`.
        """
        captured = self.capture(batch, seed, _taps(groups))
        moving = [_learned(group, theta) for group, theta in zip(groups, thetas, strict=True)]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(moving)
            thetas = [{**theta, **mine} for theta, mine in zip(thetas, moving, strict=True)]
            perturbed = [
                group.morphism.perturb(captured, group, theta, fresh=True)
                for group, theta in zip(groups, thetas, strict=True)
            ]
            with tape.stop_recording():
                new, kept, solved = _closed_forms(captured, groups, perturbed, sums)
            thetas = [{**theta, **phi} for theta, phi in zip(thetas, solved, strict=True)]
            total = tf.add_n(
                [
                    _objective(group.morphism.scalars(captured, group, theta, effect), batch[2])
                    for group, theta, effect in zip(groups, thetas, perturbed, strict=True)
                ]
            )
        gradients = tape.gradient(
            total, moving, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        moved, adam = _adam_steps(groups, moving, gradients, adam, rate)
        thetas = [{**theta, **mine} for theta, mine in zip(thetas, moved, strict=True)]
        return thetas, adam, new, kept, [dict(effect.moments) for effect in perturbed], total


def _closed_forms(captured, groups, perturbed, sums):
    """Per group: the batch's normal equations, the decayed ones, and what they solve to."""
    new, kept, solved = [], [], []
    for group, effect, old in zip(groups, perturbed, sums, strict=True):
        mine = group.morphism.equations(captured, group, effect)
        both = add_sums(scale_sums(old, FORGET), mine)
        new.append(mine)
        kept.append(both)
        solved.append(group.morphism.solve(group, both, LEARNING_DAMPING) if mine else {})
    return new, kept, solved


def _count(weight):
    return tf.cast(tf.shape(weight)[0], tf.float32)


def _taps(groups: Sequence[Group]) -> list:
    return [tap for group in groups for tap in group.morphism.taps(group.site)]


def _learned(group: Group, theta: Arrays) -> dict[str, Any]:
    return {name: theta[name] for name in group.morphism.learned if name in theta}


def _objective(scalars, weight):
    """Sum over a group's candidates of their estimated change of the mean loss."""
    linear, *columns = scalars
    curvature = tf.add_n([tf.reduce_sum(q**2) for q in columns])
    return (tf.reduce_sum(linear) + 0.5 * curvature) / _count(weight)


def _adam_steps(groups, moving, gradients, adam, rate):
    """Adam (Kingma & Ba 2015) with each unit's step relative to the size of its weights."""
    count = adam["count"] + 1.0
    new_adam: dict[str, Any] = {"count": count, "mean": [], "square": []}
    moved = []
    for index, group in enumerate(groups):
        result: dict[str, dict] = {"theta": {}, "mean": {}, "square": {}}
        for name, value in moving[index].items():
            gradient = gradients[index][name]
            mean = 0.9 * adam["mean"][index][name] + 0.1 * gradient
            square = 0.99 * adam["square"][index][name] + 0.01 * gradient**2
            direction = mean / (1 - 0.9**count) / (tf.sqrt(square / (1 - 0.99**count)) + 1e-20)
            size = group.scales[name].reshape(-1, *[1] * (len(value.shape) - 1))
            result["theta"][name] = value - rate * size * direction
            result["mean"][name], result["square"][name] = mean, square
        moved.append(result["theta"])
        new_adam["mean"].append(result["mean"])
        new_adam["square"].append(result["square"])
    return moved, new_adam


def new_adam(groups: Sequence[Group]) -> dict[str, Any]:
    """The state before the first learning step."""
    zeros = [
        {name: tf.zeros_like(value) for name, value in _learned(group, group.theta).items()}
        for group in groups
    ]
    return {"count": tf.zeros(()), "mean": zeros, "square": [dict(z) for z in zeros]}
