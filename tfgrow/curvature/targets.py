"""Targets as `fit` sees them, brought to one row per row of logits `[M, D]`.

Keras accepts targets with a last axis of 1 too many or too few; so do these. Ranks and the last
axis are static, the batch and the positions may be unknown.
"""

from __future__ import annotations

import tensorflow as tf


def dense_targets(y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """Targets `[M, D]`, from targets of the shape of the logits `z`, `[N, ..., D]`.

    Raises:
      ValueError: if the shape of `y` does not fit that of `z`.
    """
    y = tf.cast(y, tf.float32)
    if y.shape.rank == z.shape.rank - 1 and z.shape[-1] == 1:
        y = y[..., None]
    elif y.shape.rank == z.shape.rank + 1 and y.shape[-1] == 1:
        y = tf.squeeze(y, axis=-1)
    if not y.shape.is_compatible_with(z.shape):
        raise _misfit(y, z, f"{tuple(z.shape)}, one target per output")
    return tf.reshape(y, [-1, z.shape[-1]])


def sparse_targets(y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """Class indices `[M]` (int32), from `[N, ...]` or `[N, ..., 1]` for logits `[N, ..., D]`.

    Raises:
      ValueError: if the shape of `y` does not fit that of `z`.
    """
    squeezed = y
    if y.shape.rank == z.shape.rank and y.shape[-1] == 1:
        squeezed = tf.squeeze(y, axis=-1)
    if not squeezed.shape.is_compatible_with(z.shape[:-1]):
        raise _misfit(y, z, f"class indices of shape {tuple(z.shape[:-1])}")
    return tf.reshape(tf.cast(squeezed, tf.int32), [-1])


def position_targets(y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """Targets `[M, ...]`: the axes of `y` that run over samples and positions of `z` flattened.

    Raises:
      ValueError: if `y` lacks axes for the positions of `z`.
    """
    positions = z.shape[:-1]
    if y.shape.rank is None or y.shape.rank < positions.rank:
        raise _misfit(y, z, f"targets whose first axes are {tuple(positions)}")
    if (
        not y.shape[: positions.rank].is_compatible_with(positions)
        or None in y.shape[positions.rank :]
    ):
        raise _misfit(y, z, f"targets whose first axes are {tuple(positions)}")
    return tf.reshape(y, [-1, *y.shape[positions.rank :]])


def align_ranks(y: tf.Tensor, prediction: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Both tensors with the ranks Keras gives them before it calls a loss function."""
    if y.shape.rank == 1 and prediction.shape.rank == 2 and prediction.shape[-1] == 1:
        return y[:, None], prediction
    if prediction.shape.rank == 1 and y.shape.rank == 2 and y.shape[-1] == 1:
        return y, prediction[:, None]
    if y.shape.rank == prediction.shape.rank + 1 and y.shape[-1] == 1:
        return tf.squeeze(y, axis=-1), prediction
    if prediction.shape.rank == y.shape.rank + 1 and prediction.shape[-1] == 1:
        return y, tf.squeeze(prediction, axis=-1)
    return y, prediction


def _misfit(y: tf.Tensor, z: tf.Tensor, expected: str) -> ValueError:
    return ValueError(
        f"The targets do not fit the model's output: found targets of shape {y.shape} for an "
        f"output of shape {z.shape}, expected {expected}. Give the data the loss was compiled for."
    )
