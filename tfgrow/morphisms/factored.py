"""Kronecker-factored sums of the quadratic in weights that a layer's response is linear in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfgrow.curvature.normal import outputs_sums

ROWS = 4096
"""So many positions of a batch are enough to tell how inputs are correlated."""


def factored_sums(
    respond: Callable[[Any], Any],
    shape: tuple[int, ...],
    patches: Callable[[Any], Any],
    read: Any,
    stacked: Any,
) -> dict[str, Any]:
    """As `curvature.normal.kronecker_sums` of one unit; inputs' correlations are of some samples.

    Args:
      respond: weights -> the response that they make of `read`.
      shape: of the weights, outputs last.
      patches: samples of what is read -> what each output position sees of them, `[N, ..., A]`, in
        the order of the weights' other axes.
      read: what the layer reads, `[N, ...]`.
      stacked: cotangents of its response, `[1 + K, N, ..., O]`.
    """
    outputs = shape[-1]
    start = tf.zeros(shape)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(start)
        response = respond(start)
    slope = tape.gradient(response, start, output_gradients=stacked[0])
    samples = tf.shape(read)[0]
    positions = tf.size(stacked[0]) // (samples * outputs)
    some = tf.clip_by_value(ROWS // positions, 1, samples)
    seen = patches(read[:some])
    rows = tf.reshape(seen, (-1, start.shape.num_elements() // outputs))
    share = tf.cast(samples, tf.float32) / tf.cast(some, tf.float32)
    return {
        "g": tf.reshape(slope, (1, -1)),
        "a/0": share * tf.matmul(rows, rows, transpose_a=True)[None],
        **outputs_sums(tf.reshape(stacked[1:], (-1, outputs))),
        "rows/0": tf.cast(samples * positions, tf.float32),
        "energy": tf.zeros((1,)),
        "usual": tf.zeros(()),
    }
