"""Slow twins of the fast formulas of this package: obvious, and used by tests only."""

from __future__ import annotations

import math

import tensorflow as tf

from tfgrow.curvature.loss_head import LossHead


def output_hessian(head: LossHead, y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """Hessian `[N, D, D]` of each sample's loss with respect to its D flattened logits.

    Differentiates `head.per_sample` twice, one output at a time, and clips nothing.

    Args:
      head: the loss as a function of the logits.
      y: targets, as the loss takes them.
      z: logits `[N, ...]` with D entries per sample.
    """
    entries = math.prod(z.shape[1:])
    zero = tf.UnconnectedGradients.ZERO
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(z)
        with tf.GradientTape() as inner:
            inner.watch(z)
            total = tf.reduce_sum(head.per_sample(y, z))
        gradient = tf.reshape(inner.gradient(total, z, unconnected_gradients=zero), [-1, entries])
        slopes = [gradient[:, entry] for entry in range(entries)]
    rows = [outer.gradient(slope, z, unconnected_gradients=zero) for slope in slopes]
    return tf.stack([tf.reshape(row, [-1, entries]) for row in rows], axis=1)
