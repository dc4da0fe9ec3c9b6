"""Losses of one row of logits, and the square roots of their Hessians, in closed form.

Layout: a *row* is the logits of one output position of one sample. `z` is `[M, D]` with
M = samples * positions rows of D logits, `y` the targets of these rows, everything float32.
A *root* `[M, D, K]` holds K columns h_k per row; sum_k h_k h_k^T is the row's Hessian `[D, D]`,
or has it as its expectation.
"""

from __future__ import annotations

import abc
import dataclasses

import tensorflow as tf

from tfgrow.curvature.targets import dense_targets, sparse_targets


class RowLoss(abc.ABC):
    """The loss of one row of logits with the square roots of its Hessian."""

    per_position: bool = True
    """True if every output position is a row of its own, False if a sample is one row `[M, ...]`
    whose positions may interact; its roots then cover all its D entries, flattened."""

    piecewise_linear: bool = False
    """True if the Hessian is zero almost everywhere, so that it says nothing."""

    @abc.abstractmethod
    def targets(self, y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
        """Targets of the rows `[M, ...]`, from those given to `fit` and logits `[N, ..., D]`."""

    @abc.abstractmethod
    def values(self, y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
        """Loss of each row, `[M]`."""

    @abc.abstractmethod
    def exact_root(self, y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
        """Root `[M, D, D]` of the Hessian of each row."""

    @abc.abstractmethod
    def sampled_root(self, y: tf.Tensor, z: tf.Tensor, draws: int, seed: tf.Tensor) -> tf.Tensor:
        """Random root `[M, D, draws]`, independent between rows, with zero mean."""

    @abc.abstractmethod
    def quadratic(self, y: tf.Tensor, z: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """v^T H v of each row, `[M]`, for directions `v` shaped like `z`."""

    def beyond(self, y: tf.Tensor, z: tf.Tensor, products: tf.Tensor) -> tf.Tensor | None:
        """What the loss of each row changes by along directions, beyond the second order: `[M, n]`.

        Args:
          y: targets of the rows.
          z: the rows' logits.
          products: of n directions with the columns of `exact_root`, which say all of a direction
            that the loss depends on, `[M, D, n]`.

        Returns:
          None where the columns don't tell, or there is nothing beyond.
        """
        del y, z, products
        return None


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossentropy(RowLoss):
    """-sum_k y_k log softmax(z)_k, whose Hessian is (sum_k y_k) (diag(p) - p p^T).

    Attributes:
      sparse: targets are class indices `[M]` instead of distributions `[M, D]`.
      label_smoothing: share of the target spread evenly over the classes.
    """

    sparse: bool
    label_smoothing: float = 0.0

    def targets(self, y, z):
        return sparse_targets(y, z) if self.sparse else dense_targets(y, z)

    def values(self, y, z):
        if self.sparse:
            return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=z)
        # TensorFlow's fused crossentropy has the gradient p - y, which is right only for targets
        # that sum to 1; this one is right for any.
        return -tf.reduce_sum(self._smooth(y) * tf.nn.log_softmax(z), axis=-1)

    def exact_root(self, y, z):
        p = tf.nn.softmax(z)
        away_from_mean = tf.eye(z.shape[-1]) - p[:, :, None]
        root_p = tf.exp(0.5 * tf.nn.log_softmax(z))
        return self._root_mass(y)[:, None, None] * root_p[:, None, :] * away_from_mean

    def sampled_root(self, y, z, draws, seed):
        labels = tf.random.stateless_categorical(z, draws, seed)
        drawn = tf.one_hot(labels, z.shape[-1], axis=1)
        scale = self._root_mass(y)[:, None, None] / tf.sqrt(float(draws))
        return scale * (tf.nn.softmax(z)[:, :, None] - drawn)

    def quadratic(self, y, z, v):
        p = tf.nn.softmax(z)
        # The variance of v under p around its mean: no cancellation of two large numbers.
        deviation = v - tf.reduce_sum(p * v, axis=-1, keepdims=True)
        return self._root_mass(y) ** 2 * tf.reduce_sum(p * deviation**2, axis=-1)

    def beyond(self, y, z, products):
        # h_k.v = sqrt(p_k) (v_k - p.v): around its mean, v has no first order, and y has no say
        mass, log_p = self._root_mass(y)[:, None], tf.nn.log_softmax(z)[:, :, None]
        root_p = tf.exp(0.5 * log_p)
        deviation = tf.math.divide_no_nan(products, mass[:, :, None] * root_p)
        change = tf.reduce_logsumexp(log_p + deviation, axis=1)
        return mass**2 * change - 0.5 * tf.reduce_sum(products**2, axis=1)

    def _smooth(self, y):
        return y * (1.0 - self.label_smoothing) + self.label_smoothing / y.shape[-1]

    def _root_mass(self, y):
        if self.sparse:
            return tf.ones(tf.shape(y)[:1])
        # Targets with a negative sum make the loss concave: its positive part is zero, not NaN.
        return tf.sqrt(tf.maximum(tf.reduce_sum(self._smooth(y), axis=-1), 0.0))


@dataclasses.dataclass(frozen=True)
class SigmoidCrossentropy(RowLoss):
    """Mean over D of the binary crossentropy of sigmoid(z), Hessian diag(p (1 - p)) / D.

    Attributes:
      label_smoothing: share by which targets are squeezed towards 1/2.
    """

    label_smoothing: float = 0.0

    def targets(self, y, z):
        return dense_targets(y, z)

    def values(self, y, z):
        labels = y * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=z)
        return tf.reduce_mean(losses, axis=-1)

    def exact_root(self, y, z):
        return tf.linalg.diag(tf.sqrt(self._variance(z) / z.shape[-1]))

    def sampled_root(self, y, z, draws, seed):
        shape = tf.concat([tf.shape(z), [draws]], axis=0)
        p = tf.sigmoid(z)[:, :, None]
        drawn = tf.cast(tf.random.stateless_uniform(shape, seed) < p, tf.float32)
        return (p - drawn) / tf.sqrt(float(draws * z.shape[-1]))

    def quadratic(self, y, z, v):
        return tf.reduce_mean(self._variance(z) * v**2, axis=-1)

    def beyond(self, y, z, products):
        root = tf.sqrt(self._variance(z) / z.shape[-1])[:, :, None]
        v, z = tf.math.divide_no_nan(products, root), z[:, :, None]
        change = tf.nn.softplus(z + v) - tf.nn.softplus(z) - tf.sigmoid(z) * v
        return tf.reduce_mean(change, axis=1) - 0.5 * tf.reduce_sum(products**2, axis=1)

    def _variance(self, z):
        return tf.sigmoid(z) * tf.sigmoid(-z)  # keeps its precision where 1 - p would round to 0


@dataclasses.dataclass(frozen=True)
class SquaredError(RowLoss):
    """Mean over D of (z - y)^2, whose Hessian is 2/D times the identity."""

    def targets(self, y, z):
        return dense_targets(y, z)

    def values(self, y, z):
        return tf.reduce_mean((z - y) ** 2, axis=-1)

    def exact_root(self, y, z):
        size = z.shape[-1]
        return tf.sqrt(2.0 / size) * tf.eye(size, batch_shape=tf.shape(z)[:1])

    def sampled_root(self, y, z, draws, seed):
        shape = tf.concat([tf.shape(z), [draws]], axis=0)
        return tf.sqrt(2.0 / (z.shape[-1] * draws)) * random_signs(shape, seed)

    def quadratic(self, y, z, v):
        return 2.0 * tf.reduce_mean(v**2, axis=-1)


def random_signs(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Independent float32 entries, -1 or 1 with equal chances."""
    heads = tf.random.stateless_uniform(shape, seed) < 0.5
    return tf.where(heads, 1.0, -1.0)
