"""Columns of output Hessians: laid out by position, and weighed by sample.

A column is a tensor of the shape of the logits z `[N, ..., D]`; sum_k h_ik h_ik^T = H_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf


def columns_of_positions(root: tf.Tensor, z: tf.Tensor) -> list[tf.Tensor]:
    """Columns that are zero at all positions but one: P * K tensors of the shape of `z`.

    Args:
      root: `[N * P, D, K]`, the K columns of each of the P positions of each sample.
      z: logits `[N, ..., D]` whose axes between the first and the last, of fixed sizes, are the
        positions.
    """
    positions = math.prod(z.shape[1:-1])
    blocks = tf.reshape(root, [-1, positions, *root.shape[1:]])
    here = tf.eye(positions)
    return [
        tf.reshape(here[position][:, None] * blocks[..., k], tf.shape(z))
        for position in range(positions)
        for k in range(root.shape[-1])
    ]


def weigh_values(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Losses or quadratics `[N]`, or gradients `[N, ...]`, times the sample weights `[N]`.

    Weights with further axes, such as `[N, T]` for time steps, weigh the positions of gradients.
    """
    return values * _with_axes(weights, values)


def weigh_columns(columns: Sequence[tf.Tensor], weights: tf.Tensor) -> list[tf.Tensor]:
    """Columns of the Hessians w_i H_i from those of H_i; the weights `[N]` are not negative.

    Weights with further axes, such as `[N, T]` for time steps, weigh the positions of exact and
    sampled columns.

    Example:

    >>> column = tf.ones([2, 3])
    >>> weigh_columns([column], tf.constant([4.0, 0.0]))[0].numpy()
    array([[2., 2., 2.],
           [0., 0., 0.]], dtype=float32)
    """
    return [h * _with_axes(tf.sqrt(tf.cast(weights, tf.float32)), h) for h in columns]


def _with_axes(weights: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """The weights with axes of size 1 appended, so that they multiply `values`."""
    weights = tf.cast(weights, tf.float32)
    for _ in range(values.shape.rank - weights.shape.rank):
        weights = weights[..., None]
    return weights
