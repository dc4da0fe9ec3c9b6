"""The way that estimates replace: build each expanded network and learn its theta on the true loss.

Theta alone is learned, as a round does: the incoming weights of the new unit (of a split: the
difference between the two children), and the outgoing weights of an added one. Everything else is
held fixed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

import tfgrow
from experiments.expanded import expand


@dataclasses.dataclass(frozen=True)
class RivalTimes:
    """Seconds that one candidate took.

    Attributes:
      build: making the expanded network.
      trace: what the first learning step and the first evaluated batch took longer than the others.
      learn: the learning steps without tracing.
      evaluate: the forward passes on the scoring batches without tracing.
      change: what learning changed the loss on those batches by, against the network at theta = 0.
    """

    build: float
    trace: float
    learn: float
    evaluate: float
    change: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.build + self.trace + self.learn + self.evaluate


class ThetaLearner:
    """Learns one candidate's theta in its expanded network, on the true loss.

    Args:
      grown: the network with this one candidate applied; its new unit is the site's last.
      candidate: the candidate.
    """

    def __init__(self, grown: keras.Model, candidate: tfgrow.Candidate):
        site = next(s for s in tfgrow.find_sites(grown) if s.name == candidate.site.name)
        self._model = grown
        self._moves = [
            _along(variable, site.producer.variable_axes[name].fan_out, _signs(site, candidate))
            for name, variable in site.producer.growable_variables().items()
        ]
        if candidate.morphism == "add":
            self._moves += _new_rows(site)
        self._optimizer = keras.optimizers.Adam(0.01)
        self._optimizer.build([variable for variable, _ in self._moves])
        self.step = tf.function(self._step, autograph=False)
        self.losses = tf.function(self._losses, autograph=False)

    def _step(self, x, y):
        """One step of theta on a batch."""
        variables = [variable for variable, _ in self._moves]
        values = [variable.value for variable in variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            loss = tf.reduce_mean(self._losses(x, y))
        gradients = tape.gradient(loss, values)
        moved = [move(g) for (_, move), g in zip(self._moves, gradients, strict=True)]
        self._optimizer.apply_gradients(zip(moved, variables, strict=True))

    def _losses(self, x, y):
        """Loss of every sample, in inference mode as the estimate has it."""
        return keras.losses.sparse_categorical_crossentropy(y, self._model(x, training=False))


def time_rival(
    model: keras.Model,
    candidate: tfgrow.Candidate,
    learn: Sequence,
    score: Sequence,
    steps: int,
) -> RivalTimes:
    """Builds one candidate's network, learns and evaluates it.

    Args:
      model: the growable model.
      candidate: one of its candidates, as a round begins with it.
      learn: batches `(x, y, ...)` to learn on, repeated if they are too few.
      score: batches to evaluate on.
      steps: learning steps.
    """
    started = time.perf_counter()
    grown = expand(model, [candidate])
    learner = ThetaLearner(grown, candidate)
    build = time.perf_counter() - started
    learning = []
    for number in range(steps):
        x, y = learn[number % len(learn)][:2]
        started = time.perf_counter()
        learner.step(x, y)
        learning.append(time.perf_counter() - started)
    evaluating, total, count = [], 0.0, 0
    for x, y, *_ in score:
        started = time.perf_counter()
        total += float(tf.reduce_sum(learner.losses(x, y)))
        evaluating.append(time.perf_counter() - started)
        count += len(y)
    before = sum(_sum_of_losses(model, x, y) for x, y, *_ in score)
    trace = _first_extra(learning) + _first_extra(evaluating)
    learned, evaluated = sum(learning), sum(evaluating)
    return RivalTimes(
        build,
        trace,
        learned - _first_extra(learning),
        evaluated - _first_extra(evaluating),
        (total - before) / count,
    )


def _signs(site, candidate) -> np.ndarray:
    """`[units]`: how much each unit's weights move with theta."""
    signs = np.zeros(site.units, dtype="float32")
    signs[-1] = 1.0
    if candidate.morphism == "split":
        signs[candidate.unit], signs[-1] = 1.0, -1.0
    return signs


def _along(variable, axis: int, signs: np.ndarray):
    """The variable, and what projects its gradient on the moves that theta can make."""
    shape = [1] * len(variable.shape)
    shape[axis] = -1
    direction = signs.reshape(shape)

    def project(gradient):
        theta = tf.reduce_sum(direction * gradient, axis=axis, keepdims=True)
        return direction * theta

    return variable, project


def _new_rows(site) -> list:
    """The consumers' kernels, and what keeps of their gradients the new unit's rows."""
    moves = []
    for leaf in site.leaves:
        for node in leaf.consumers:
            layer = node.operation
            kernel = layer.growable_variables()[layer.kernel_name]
            shape = [1] * len(kernel.shape)
            shape[layer.variable_axes[layer.kernel_name].fan_in] = -1
            mask = np.zeros(leaf.channels.size, dtype="float32")
            mask[leaf.channels.index[-1]] = 1.0
            mask = mask.reshape(shape)
            moves.append((kernel, lambda gradient, mask=mask: gradient * mask))
    return moves


def _first_extra(seconds: Sequence[float]) -> float:
    """By how much the first of equal steps was longer than the others: tracing."""
    return max(seconds[0] - float(np.median(seconds[1:])), 0.0) if len(seconds) > 1 else 0.0


def _sum_of_losses(model, x, y) -> float:
    losses = keras.losses.sparse_categorical_crossentropy(y, model(x, training=False))
    return float(tf.reduce_sum(losses))
