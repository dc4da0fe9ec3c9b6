"""The Gram matrix of many columns, kept as a few rows instead of as a matrix.

Of rows `C [rows, O]`, the matrix `C'C` of a consumer of thousands of outputs takes a second to make
and a minute to factor. A sketch adds every row, with a random sign, to one of `SKETCH` rows `Y`:
`Y'Y` is `C'C` on average, sketches of batches add up, and systems with it are of `SKETCH` unknowns
(the count sketch, Clarkson & Woodruff 2013, arXiv 1207.6365).
"""

from __future__ import annotations

import tensorflow as tf

SKETCHED = 1024
"""Of more outputs than this, sums keep a sketch."""

SKETCH = 256
"""Rows of a sketch."""


def sketch(rows):
    """The sketch `[SKETCH, O]` of rows `[r, O]`; equal rows give equal sketches."""
    # Seeded by what is sketched: no state, and the signs of two batches have nothing in common.
    seed = tf.bitcast(tf.stack([tf.reduce_sum(rows), tf.reduce_sum(tf.abs(rows))]), tf.int32)
    count = tf.shape(rows)[0]
    drawn = tf.random.stateless_uniform((count,), seed, maxval=2 * SKETCH, dtype=tf.int32)
    signs = tf.cast(2 * (drawn % 2) - 1, rows.dtype)
    return tf.math.unsorted_segment_sum(signs[:, None] * rows, drawn // 2, SKETCH)


def solve_by_sketch(a_values, y, ridge, right):
    """`x [..., n, A, O]` of `(a_values x Y'Y + ridge) x = right`, all dampings at once.

    Args:
      a_values: `[n, A]`, not negative.
      y: `[SKETCH, O]`.
      ridge: `[..., n]`, positive.
      right: `[n, A, O]`.
    """
    values, vectors = tf.linalg.eigh(tf.matmul(y, y, transpose_b=True))
    basis = tf.matmul(vectors, y, transpose_a=True)  # [SKETCH, O]
    a, ridge = a_values[:, :, None], ridge[..., None, None]
    # Woodbury: (a Y'Y + r)^-1 = (1 - Y' U a / (a L + r) U' Y) / r, with Y Y' = U L U'
    seen = tf.einsum("nbo,ko->nbk", right, basis) * a / (a * tf.nn.relu(values) + ridge)
    return (right - tf.einsum("...nbk,ko->...nbo", seen, basis)) / ridge
