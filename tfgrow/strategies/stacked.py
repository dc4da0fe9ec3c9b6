"""Parameters of candidates that are worked on together, a row for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrow.morphisms.base import Candidate, Group


class Rows:
    """Some parameters of a group's candidates, one row for each of them, `[n, d]`.

    Args:
      group: the candidates.
      scales: by name, the size `[n]` of an entry that counts as 1.

    Attributes:
      scale: that size of every entry, `[n, d]`.
    """

    def __init__(self, group: Group, scales: Mapping[str, np.ndarray]):
        self._shapes = {name: np.shape(group.theta[name]) for name in scales}
        self._widths = [int(np.prod(shape[1:])) for shape in self._shapes.values()]
        columns = [
            np.repeat(np.reshape(scale, (-1, 1)), width, axis=1)
            for scale, width in zip(scales.values(), self._widths, strict=True)
        ]
        self.scale = np.concatenate(columns, axis=1).astype("float32")

    def pack(self, theta) -> np.ndarray:
        """The rows of stacked parameters."""
        flat = [np.reshape(theta[name], (len(self.scale), -1)) for name in self._shapes]
        return np.concatenate(flat, axis=1).astype("float32") / self.scale

    def unpack(self, rows) -> dict[str, Any]:
        """Stacked parameters, by name, of rows."""
        parts = tf.split(rows * self.scale, self._widths, axis=1)
        return {
            name: tf.reshape(part, shape)
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }


def with_theta(
    candidates: Sequence[Candidate], positions: Sequence, thetas: Sequence[Mapping[str, Any]]
) -> list[Candidate]:
    """Candidates with other parameters.

    Args:
      candidates: as they were.
      positions: per group, those of its candidates among them.
      thetas: per group, the stacked parameters.
    """
    found = list(candidates)
    for where, theta in zip(positions, thetas, strict=True):
        values = {name: np.asarray(value) for name, value in theta.items()}
        for row, place in enumerate(where):
            mine = {name: value[row] for name, value in values.items()}
            found[place] = found[place].replace(theta=mine)
    return found


def samples_of(batch):
    """Number of a batch's samples, as a float."""
    return tf.cast(tf.shape(batch[2][0])[0], tf.float32)
