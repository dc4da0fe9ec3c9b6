"""The estimate's passes over a batch, as functions to be traced once per model shape.

Each pass captures the batch once and serves all groups of candidates, however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrow.capture.capture import Capture, capture, moved, observe
from tfgrow.capture.forward import push_forward
from tfgrow.curvature.normal import LEARNING_DAMPING, add_sums, is_factored, scale_sums
from tfgrow.curvature.total_loss import TotalLoss
from tfgrow.graph.nodes import Graph
from tfgrow.morphisms.base import Group, Perturbed, perturb_all

FORGET = 0.9
"""How much of the earlier batches' normal equations each learning step keeps."""

CHECKS = 1000
"""From here on the numbers that seeds of checks are made with: far from those of outputs."""

Arrays = Mapping[str, Any]

fold_in = tf.random.experimental.stateless_fold_in


class Passes:
    """The passes for one model and loss, over batches that `TotalLoss.arranged` has seen.

    With `at_minimum` candidates are learned and scored as if the gradient were zero.
    """

    def __init__(self, graph: Graph, loss: TotalLoss, draws: int, at_minimum: bool = False):
        self._graph = graph
        self._loss = loss
        self._draws = draws
        self._at_minimum = at_minimum
        self._settled: list[tuple[Sequence[Group], list[Arrays]]] = []

    def settle(self, groups: Sequence[Group], thetas: Sequence[Arrays]) -> None:
        """From here on losses, gradients and curvature are those of the logits moved by some edits.

        They are moved along the linearised network, and what was settled before counts too. Passes
        that were traced before know nothing of it.
        """
        self._settled.append((groups, [tensors(theta) for theta in thetas]))

    def unsettle(self) -> None:
        """Takes back the last `settle`."""
        self._settled.pop()

    def _moved_by(self, x) -> list:
        """By head, how far what was settled moves the logits; empty if nothing was."""
        if not self._settled:
            return []
        captured = observe(self._graph, x)
        tangents: dict = {}
        for groups, thetas in self._settled:
            perturbed = perturb_all(captured, groups, thetas, fresh=False)
            _add_tangents(tangents, groups, thetas, perturbed)
        return push_forward(self._graph, self._loss.heads, x, tangents)[1]

    def capture(self, batch, seed, taps) -> Capture:
        """One batch with gradient and columns at the taps."""
        x, y, weights = batch
        reused = self._loss.column_of_gradient
        captured = capture(
            self._graph,
            self._loss.heads,
            x,
            taps,
            gradient_of=lambda z: dict(enumerate(self._loss.gradient(y, z, weights))),
            columns_of=lambda z: self._loss.columns(y, z, weights, self._draws, seed),
            reuse_gradient=None if reused is None else lambda g: reused(g, weights[0]),
            moved_by=self._moved_by(x),
        )
        return captured.without_gradient() if self._at_minimum else captured

    def loss(self, batch) -> Any:
        """Sum of the weighted losses of a batch, and the number of its samples."""
        x, y, weights = batch
        logits = self._logits(x, observe(self._graph, x).values)
        return self._loss.value(y, logits, weights), _count(weights)

    def _logits(self, x, values: Mapping) -> list:
        """The logits among the values of all taps, moved by what was settled."""
        return moved([values[head.tap] for head in self._loss.heads], self._moved_by(x))

    def _sum_of_losses(self, batch, captured: Capture) -> Any:
        _, y, weights = batch
        return self._loss.value(y, captured.logits, weights)

    def scalars(self, batch, seed, groups: Sequence[Group], thetas: Sequence[Arrays]) -> Any:
        """Sums over a batch of `(loss, linear [C], gram [C, C], samples)` for all candidates."""
        captured, _, together = self._together(batch, seed, groups, thetas)
        linear = together[0]
        columns = tf.reshape(together[1:], (-1, together.shape[2]))
        gram = tf.matmul(columns, columns, transpose_a=True)
        loss = self._sum_of_losses(batch, captured)
        return loss, tf.reduce_sum(linear, 0), gram, _count(batch[2])

    def alone(self, batch, seed, groups: Sequence[Group], thetas: Sequence[Arrays]) -> Any:
        """Sums over a batch of `(loss, linear [C], curvature [C])` of every candidate alone."""
        captured, _, together = self._together(batch, seed, groups, thetas)
        curvature = tf.reduce_sum(together[1:] ** 2, axis=(0, 1))
        return self._sum_of_losses(batch, captured), tf.reduce_sum(together[0], 0), curvature

    def changes(
        self, batch, seed, groups: Sequence[Group], thetas: Sequence[Arrays], checks: int
    ) -> Any:
        """Sums over a batch of `(loss, change [C], samples)` for every candidate alone.

        Where the columns tell what the logits change by, it is the loss's own change along that.
        With checks they are followed by what those found, see `_check`.
        """
        _, y, weights = batch
        captured, perturbed, together = self._together(batch, seed, groups, thetas)
        logits = captured.logits
        changes = together[0] + 0.5 * tf.reduce_sum(together[1:] ** 2, 0)  # [N, C]
        if not self._at_minimum:  # of the loss as it is
            changes += self._loss.beyond(y, logits, together[1:], weights, self._draws)
        losses = self._loss.per_sample(y, logits, weights)
        sums = (tf.reduce_sum(losses), tf.reduce_sum(changes, 0), _count(weights))
        if not checks:
            return sums
        found = self._check(batch, seed, groups, thetas, perturbed, losses, changes, checks)
        return (*sums, *found)

    def _check(self, batch, seed, groups, thetas, perturbed, losses, changes, checks) -> tuple:
        """Candidates drawn at random are really carried through the network, one per sample.

        Those whose estimates are large are drawn more often. The draws depend on the estimates
        alone, so that on average what is found is what all samples would show.

        Returns:
          Sums `[C]`: of the squared estimates of all samples; how often each candidate was drawn;
          of what the loss really changed by beyond the estimate, and of its square.
        """
        squares = tf.reduce_sum(changes**2, axis=0)
        count = changes.shape[1]

        def check(number):
            which = _draw(tf.sqrt(squares), tf.shape(losses)[0], fold_in(seed, CHECKS + number))
            chosen = tf.one_hot(which, count)
            change = self.carried(batch, groups, thetas, perturbed, chosen) - losses
            rest = change - tf.reduce_sum(chosen * changes, axis=1)
            by_sample = tf.stack([tf.ones_like(rest), rest, rest**2])
            return tf.matmul(by_sample, chosen)

        found = tf.map_fn(check, tf.range(checks), fn_output_signature=tf.float32)
        return (squares, *tf.unstack(tf.reduce_sum(found, axis=0)))

    def carried(
        self,
        batch,
        groups: Sequence[Group],
        thetas: Sequence[Arrays],
        perturbed: Sequence[Perturbed],
        chosen,
    ) -> Any:
        """Each sample's loss `[N]` after what some of the candidates change there is added.

        It is that of the really edited network, except where what the candidates change comes round
        to their own site again (a residual stream): that they don't see.

        Args:
          batch: `(x, targets, weights)`.
          groups: all groups.
          thetas: their parameters.
          perturbed: what they do on the batch.
          chosen: how much of each candidate is added to each sample, `[N, C]`.
        """
        x, y, weights = batch
        changed: dict = {}
        masks = tf.split(chosen, [len(group.units) for group in groups], axis=1)
        for group, theta, effect, mask in zip(groups, thetas, perturbed, masks, strict=True):
            # the transpose of a sum against covectors spreads the mask over whatever is perturbed
            values = {place: value[None] for place, value in effect.values.items()}
            mine = Perturbed(group.morphism.slopes(group, mask[None], values), effect.moments)
            _add_tangents(changed, [group], [theta], [mine])
        logits = self._logits(x, observe(self._graph, x, changed).values)
        return self._loss.per_sample(y, logits, weights)

    def _together(self, batch, seed, groups, thetas) -> tuple[Capture, list[Perturbed], Any]:
        """The batch, what candidates do, and that against gradient and columns, `[1 + K, N, C]`."""
        captured = self.capture(batch, seed, taps_of(groups))
        perturbed = perturb_all(captured, groups, thetas, fresh=False)
        covectors = covectors_of(captured, groups, thetas, perturbed)
        return captured, perturbed, tf.concat(_scalars(groups, covectors, perturbed), axis=2)

    def joint(self, batch, groups: Sequence[Group], thetas: Sequence[Arrays]) -> Any:
        """Sums over a batch of the joint change by forward accumulators, and its samples."""
        x, y, weights = batch
        captured = observe(self._graph, x)
        tangents: dict = {}
        _add_tangents(tangents, groups, thetas, perturb_all(captured, groups, thetas, fresh=False))
        _, pushed = push_forward(self._graph, self._loss.heads, x, tangents)
        logits = self._logits(x, captured.values)
        gradients = self._loss.gradient(y, logits, weights)
        slopes = [tf.reduce_sum(g * v) for g, v in zip(gradients, pushed, strict=True)]
        curvature = self._loss.quadratic(y, logits, pushed, weights)
        return sum(slopes[1:], slopes[0]) + 0.5 * curvature, _count(weights)

    def learn(self, batch, seed, groups: Sequence[Group], parameters: Parameters, adam, sums, rate):
        """One learning step of all candidates on a batch.

        Args:
          batch: `(x, targets, weights)`.
          seed: of the sampled columns.
          groups: all groups.
          parameters: how the learned parameters lie in a vector.
          adam: `(vector, mean, square, count)`: all learned parameters, the moments of their
            gradients, and the number of steps so far.
          sums: per group, the decayed normal equations of earlier batches.
          rate: step size relative to the weights' natural size; at 0 nothing moves.

        Returns:
          `(adam, sums of this batch, decayed sums, moments, objective)`, the objective being the
          loss where nothing moves.
        """
        captured = self.capture(batch, seed, taps_of(groups))
        solved = [
            _solved(group, old) if group.morphism.perturbs_by_solved else {}
            for group, old in zip(groups, sums, strict=True)
        ]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            vector = adam[0]
            tape.watch(vector)
            thetas = [a | b for a, b in zip(parameters.unpack(vector), solved, strict=True)]
            perturbed = perturb_all(captured, groups, thetas, fresh=True)
        loss = self._sum_of_losses(batch, captured)
        new, kept = _equations(captured, groups, perturbed, sums, loss)

        learning = [row for row, group in enumerate(groups) if group.learned]

        def improve():
            mine = [groups[row] for row in learning]
            effects = [perturbed[row] for row in learning]
            whole = [
                thetas[row] | (solved[row] or _solved(groups[row], kept[row])) for row in learning
            ]
            covectors = covectors_of(captured, mine, whole, effects)
            too_long = [is_factored(sums[row]) for row in learning]
            total, slopes = objective(mine, covectors, effects, too_long)
            values = [effect.values for effect in effects]
            gradient = tape.gradient(values, vector, output_gradients=slopes)
            count = _count(batch[2])
            return (*_adam_step(adam, gradient / count, rate), total / count)

        def settle():  # closed forms and statistics only: spared is more than half of the step
            return (*adam, loss)

        *adam, total = tf.cond(rate > 0.0, improve, settle) if learning else settle()
        return tuple(adam), new, kept, [dict(effect.moments) for effect in perturbed], total


class Parameters:
    """All learned parameters of some groups as one vector, each in units of its natural size.

    A step of one size then suits every candidate, whatever the scale of its unit's weights.
    """

    def __init__(self, groups: Sequence[Group]):
        self._groups = groups
        self._layout = [
            (row, name, np.shape(group.theta[name]), _unit_column(group, name))
            for row, group in enumerate(groups)
            for name in group.learned
            if name in group.theta
        ]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(shape, dtype=np.int64)) for _, _, shape, _ in self._layout)

    def pack(self) -> np.ndarray:
        """The groups' parameters as the vector."""
        parts = [
            (self._groups[row].theta[name] / unit).reshape(-1)
            for row, name, _, unit in self._layout
        ]
        return np.concatenate([np.zeros(0), *parts]).astype("float32")

    def unpack(self, vector) -> list[dict[str, Any]]:
        """The vector as one dict of stacked parameters per group."""
        thetas: list[dict[str, Any]] = [{} for _ in self._groups]
        if not self._layout:
            return thetas
        sizes = [int(np.prod(shape, dtype=np.int64)) for _, _, shape, _ in self._layout]
        for part, (row, name, shape, unit) in zip(
            tf.split(vector, sizes), self._layout, strict=True
        ):
            thetas[row][name] = tf.reshape(part, shape) * unit
        return thetas


def _unit_column(group: Group, name: str) -> np.ndarray:
    """The natural size of a parameter's entries, `[n, 1, ...]`."""
    axes = np.ndim(group.theta[name]) - 1
    return np.asarray(group.scales[name], dtype="float32").reshape(-1, *[1] * axes)


def _equations(captured, groups, perturbed, sums, loss):
    """Per group: the batch's normal equations, and those of the batches before it added."""
    new, kept = [], []
    for group, effect, old in zip(groups, perturbed, sums, strict=True):
        mine = group.morphism.equations(captured, group, effect)
        mine = {**mine, "loss": loss} if mine else mine
        new.append(mine)
        kept.append(add_sums(scale_sums(old, FORGET), mine))
    return new, kept


def _solved(group, sums) -> dict[str, Any]:
    """A group's closed form while it is learned; nothing where all of it is learned."""
    return group.morphism.solve(group, sums, LEARNING_DAMPING) if sums else {}


def tensors(arrays: Arrays) -> dict[str, Any]:
    """Parameters as tensors."""
    return {name: tf.constant(value, tf.float32) for name, value in arrays.items()}


def _add_tangents(tangents: dict, groups, thetas, perturbed) -> None:
    """Adds what all candidates of some groups perturb, by tap."""
    for group, theta, effect in zip(groups, thetas, perturbed, strict=True):
        for tap, value in group.morphism.tangents(group, theta, effect).items():
            tangents[tap] = tangents[tap] + value if tap in tangents else value


def _count(weights):
    return tf.cast(tf.shape(weights[0])[0], tf.float32)


def _draw(weights, samples, seed):
    """One of the entries of `weights [C]` per sample, as often as in proportion: `[samples]`.

    Systematic: how often each is drawn is off by less than one.
    """
    shares = tf.math.divide_no_nan(tf.cumsum(weights), tf.reduce_sum(weights))
    places = tf.cast(tf.random.experimental.stateless_shuffle(tf.range(samples), seed), tf.float32)
    start = tf.random.stateless_uniform((), fold_in(seed, 1))
    which = tf.searchsorted(shares, (places + start) / tf.cast(samples, tf.float32), side="right")
    return tf.minimum(which, weights.shape[0] - 1)


def taps_of(groups: Sequence[Group]) -> list:
    """Where gradient and columns are needed for some groups."""
    return [tap for group in groups for tap in group.morphism.taps(group.site)]


def covectors_of(captured, groups, thetas, perturbed) -> list[dict[int, Any]]:
    """Gradient and columns at what each of some groups changes, see `Morphism.covectors`."""
    return [
        group.morphism.covectors(captured, group, theta, effect)
        for group, theta, effect in zip(groups, thetas, perturbed, strict=True)
    ]


def _scalars(groups, covectors, perturbed) -> list:
    return [
        group.morphism.scalars(group, mine, effect)
        for group, mine, effect in zip(groups, covectors, perturbed, strict=True)
    ]


def objective(groups, covectors, perturbed, too_long: Sequence[bool] | None = None):
    """Sum of all candidates' estimated changes over a batch, and its gradient at `perturbed`.

    Those of groups whose closed form may be `too_long` are taken at their best length up to 1.

    With the scalars `s` of a candidate it is `s_0 + 1/2 sum_k s_k^2`, so that the gradient at its
    perturbation is `c_0 + sum_k s_k c_k`. Written out: automatic differentiation of so many small
    operations takes a good part of the time to trace a step.
    """
    passes = next(iter(covectors[0].values())).shape[0]
    first = np.eye(passes, 1, dtype="float32")[:, :, None]
    total, slopes = 0.0, []
    every = _scalars(groups, covectors, perturbed)
    which = too_long or [False] * len(groups)
    for group, mine, scalars, shorten in zip(groups, covectors, every, which, strict=True):
        lengths = _lengths_on(scalars) if shorten else 1.0
        scalars = lengths * scalars
        weights = first + (1.0 - first) * scalars
        total += 0.5 * tf.reduce_sum((first + weights) * scalars)
        slopes.append(group.morphism.slopes(group, lengths * weights, mine))
    return total, slopes


def _lengths_on(scalars):
    """The best lengths of candidates, `[n]`, on a batch with their scalars `[1 + K, N, n]`."""
    curvature = tf.reduce_sum(scalars[1:] ** 2, axis=(0, 1))
    return best_lengths(tf.reduce_sum(scalars[0], axis=0), curvature)


def best_lengths(linear, curvature):
    """The lengths up to 1 at which candidates alone change the loss most, `[n]`, as a tensor."""
    slope = -linear
    return tf.where(slope < curvature, tf.math.divide_no_nan(tf.nn.relu(slope), curvature), 1.0)


def _adam_step(adam, gradient, rate):
    """One step of Adam (Kingma & Ba 2015) on the vector of parameters."""
    vector, mean, square, count = adam
    count = count + 1.0
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.99 * square + 0.01 * gradient**2
    step = rate * tf.sqrt(1 - 0.99**count) / (1 - 0.9**count)
    return vector - step * mean / (tf.sqrt(square) + 1e-20), mean, square, count


def new_adam(vector: np.ndarray):
    """The state before the first learning step."""
    start = tf.constant(vector)
    return start, tf.zeros_like(start), tf.zeros_like(start), tf.zeros(())
