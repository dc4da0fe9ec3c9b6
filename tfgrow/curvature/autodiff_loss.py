"""Any differentiable loss: its output Hessian by automatic differentiation, eigenvalues clipped.

The layout is that of `row_losses`. A loss that acts on each output position alone is
differentiated position by position; one that may couple the positions of a sample takes the whole
sample as one row, `z` being `[M, ...]` and its roots covering all D entries of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import tensorflow as tf

from tfgrow.curvature.row_losses import RowLoss, random_signs
from tfgrow.curvature.targets import position_targets

MAX_ENTRIES = 1024
"""Largest D whose `[D, D]` Hessian per row is still built."""

ZERO = tf.UnconnectedGradients.ZERO


@dataclasses.dataclass(frozen=True, eq=False)
class AutodiffLoss(RowLoss):
    """A loss known only as a function of targets and logits.

    The Hessian is replaced by its positive part (negative eigenvalues become 0), so that it has
    real roots and an estimate made with it is bounded below.

    Attributes:
      losses: maps targets and logits `[M, ...]` to losses, `[M]` or with more axes, over which the
        mean is taken.
      per_position: whether each output position can be a row of its own.
      piecewise_linear: whether the Hessian is zero almost everywhere.
      name: of the loss, for errors.
    """

    losses: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    per_position: bool
    piecewise_linear: bool = False
    name: str = "loss"

    def targets(self, y, z):
        return position_targets(y, z) if self.per_position else y

    def values(self, y, z):
        losses = tf.cast(self.losses(y, z), tf.float32)
        if losses.shape.rank == 0 or not losses.shape[:1].is_compatible_with(z.shape[:1]):
            raise ValueError(
                f"The loss {self.name!r} returned values of shape {losses.shape} for an output of "
                f"shape {z.shape}; expected one value per sample (or per output). The estimate "
                "needs losses that are not yet averaged over the batch: leave the reduction to "
                "Keras (for Dice and Tversky, set `axis` to all axes but the first)."
            )
        return tf.reduce_mean(tf.reshape(losses, [tf.shape(z)[0], -1]), axis=-1)

    def exact_root(self, y, z):
        hessian = self._hessian(y, z)
        # A NaN makes the eigensolver raise an error that names neither loss nor data; the caller
        # sees NaN estimates instead and can say what is wrong.
        finite = tf.reduce_all(tf.math.is_finite(hessian), axis=[1, 2], keepdims=True)
        eigenvalues, vectors = tf.linalg.eigh(tf.where(finite, hessian, 0.0))
        root = vectors * tf.sqrt(tf.maximum(eigenvalues, 0.0))[:, None, :]
        return tf.where(finite, root, math.nan)

    def sampled_root(self, y, z, draws, seed):
        root = self.exact_root(y, z)
        shape = tf.stack([tf.shape(root)[0], root.shape[-1], draws])
        return root @ random_signs(shape, seed) / tf.sqrt(float(draws))

    def quadratic(self, y, z, v):
        flat = tf.reshape(v, [-1, _entries(z)])
        along_columns = tf.linalg.matvec(self.exact_root(y, z), flat, transpose_a=True)
        return tf.reduce_sum(along_columns**2, axis=-1)

    def _hessian(self, y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
        entries = _entries(z)
        if entries > MAX_ENTRIES:
            raise ValueError(
                f"The loss {self.name!r} has no closed-form curvature here and may couple all "
                f"{entries} outputs of a sample; at most {MAX_ENTRIES} can be handled. Use "
                "curvature='empirical', or a Keras loss and activation that act on the last axis."
            )
        with tf.GradientTape() as outer:
            outer.watch(z)
            with tf.GradientTape() as inner:
                inner.watch(z)
                values = self.values(y, z)
            gradient = inner.gradient(values, z, unconnected_gradients=ZERO)
        jacobian = outer.batch_jacobian(gradient, z, unconnected_gradients=ZERO)
        hessian = tf.reshape(jacobian, [-1, entries, entries])
        return 0.5 * (hessian + tf.linalg.matrix_transpose(hessian))


def _entries(z: tf.Tensor) -> int:
    """D, the logits of one row."""
    if None in z.shape[1:]:
        raise ValueError(
            f"The output Hessian needs a fixed output shape, found {z.shape}. Fix the sizes of "
            "the model's output, or use curvature='empirical'."
        )
    return math.prod(z.shape[1:])
