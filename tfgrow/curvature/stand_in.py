"""Quadratics in what stands in for a unit: their sums over data, and their damped minimisers.

When unit c of a site goes, its values become `sum_j v_j a_j`, where a_j are the values of the
site's units and a last one is the constant 1: v_c is -1 in the *change* of the unit's values, and
the other entries are free. The estimate is `g_c.v + 1/2 v'Q_c v`, with the derivatives taken at the
unit's own channel of what the consumers read.

Layouts: units under study `n`, all of the site's units `U`; `values` `[N, P, U + 1, B]` per leaf
and its covectors `[1 + K, N, P, n, B]`, the gradient first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfgrow.curvature.normal import damped_solve, quadratic_at

DENSE_LIMIT = 4096
"""Above so many pairs of a unit under study and a unit that may stand in, Q_c is factored."""

STANDS_IN = 0.1
"""Units that go together must not hang on each other: largest share of one in another's place."""

ROUNDS = 8
"""Backward elimination takes so many rounds, whatever the number of units."""

Sums = Mapping[str, tf.Tensor]


def zero_sums(studied: int, units: int) -> dict[str, tf.Tensor]:
    """Sums of no data at all, for `studied` of a site's `units`."""
    size = units + 1
    sums = {"g": tf.zeros((studied, size)), "loss": tf.zeros(())}
    if studied * size <= DENSE_LIMIT:
        return {**sums, "q": tf.zeros((studied, size, size))}
    return {**sums, "a": tf.zeros((size, size)), "s": tf.zeros((studied,)), "rows": tf.zeros(())}


def stand_in_sums(values: Sequence, covectors: Sequence) -> dict[str, tf.Tensor]:
    """Sums of one batch, over the leaves of a site.

    `{"g": [n, U + 1], "q": [n, U + 1, U + 1]}`, or with Q_c factored as `s_c * a / rows` (the
    unit's sensitivity apart from the correlations of the values, as K-FAC has it).
    """
    size, studied = values[0].shape[2], covectors[0].shape[3]
    if studied * size <= DENSE_LIMIT:
        scalars = tf.add_n([_products(v, c) for v, c in zip(values, covectors, strict=True)])
        columns = tf.reshape(tf.transpose(scalars[1:], (2, 0, 1, 3)), (studied, -1, size))
        q = tf.matmul(columns, columns, transpose_a=True)
        return {"g": tf.reduce_sum(scalars[0], axis=0), "q": q}
    sums: dict[str, tf.Tensor] = {}
    for v, c in zip(values, covectors, strict=True):
        rows = tf.reshape(tf.transpose(v, (0, 1, 3, 2)), (-1, size))
        slope = tf.reshape(tf.transpose(c[0], (2, 0, 1, 3)), (studied, -1))
        part = {
            "g": tf.matmul(slope, rows),
            "a": tf.matmul(rows, rows, transpose_a=True),
            "s": tf.reduce_sum(c[1:] ** 2, axis=[0, 1, 2, 4]),
            "rows": tf.cast(tf.shape(rows)[0], tf.float32),
        }
        sums = {name: sums[name] + part[name] if sums else part[name] for name in part}
    return sums


def _products(values, covectors):
    """`[1 + K, N, n, U + 1]`: every sample's derivative with respect to v."""
    passes, size, studied = covectors.shape[0], values.shape[2], covectors.shape[3]
    positions = tf.shape(values)[1] * values.shape[3]
    rows = tf.reshape(tf.transpose(values, (0, 1, 3, 2)), (-1, positions, size))
    slopes = tf.transpose(covectors, (1, 0, 3, 2, 4))  # [N, 1 + K, n, P, B]
    slopes = tf.reshape(slopes, (-1, passes * studied, positions))
    products = tf.reshape(tf.matmul(slopes, rows), (-1, passes, studied, size))
    return tf.transpose(products, (1, 0, 2, 3))


def solve(sums: Sums, free: np.ndarray, own: np.ndarray, damping) -> tf.Tensor:
    """The minimising `v`, with -1 at the unit itself and 0 where it is not free.

    Args:
      sums: from `stand_in_sums`, added up over batches.
      free: bool `[n, U + 1]`, which entries may differ from 0.
      own: int `[n]`, each unit's own entry.
      damping: relative to the mean diagonal of Q_c, a number or one per unit `[n]`; or several of
        them `[D, 1]`.

    Returns:
      Float64 `[n, U + 1]`, or `[D, n, U + 1]`.
    """
    g, q = _expanded(sums)
    itself = np.eye(q.shape[-1])[own]
    mask = free * (1.0 - itself)
    inner = q * mask[:, :, None] * mask[:, None, :]
    pull = mask * (tf.linalg.matvec(q, itself) - g)
    diagonal = tf.reduce_sum(tf.linalg.diag_part(inner), -1)
    mean = tf.math.divide_no_nan(diagonal, mask.sum(axis=-1))
    ridge = tf.maximum(tf.cast(damping, tf.float64) * mean, 1e-30)
    return damped_solve(inner, ridge[..., None] * mask + (1.0 - mask), pull) * mask - itself


def spread_out(sums: Sums, free: np.ndarray, own: np.ndarray, damping, most: int) -> np.ndarray:
    """Which entries may be used if up to `most` units are to go together: bool `[n, U + 1]`.

    Units that may all go must not stand in for each other. The cheapest ones are found by backward
    elimination: the next one to go is chosen with the others standing in only on those that stay.

    Args:
      sums: as for `solve`.
      free: which entries may be used at all, as for `solve`.
      own: as for `solve`.
      damping: as for `solve`.
      most: how many units to spare from standing in.
    """
    free = free.copy()
    itself = np.zeros_like(free, dtype=float)
    itself[np.arange(len(own)), own] = 1.0
    gone: list[int] = []
    while len(gone) < min(most, len(own) - 1):
        v = solve(sums, free, own, damping).numpy()
        cost = quadratic_at(*_expanded(sums), v).numpy()
        standing = np.abs(v * (1.0 - itself))
        chunk: list[int] = []
        for row in np.argsort(cost, kind="stable"):
            leans = [*standing[row, own[chunk]], *standing[chunk, own[row]]]
            if row not in gone and max(leans, default=0.0) <= STANDS_IN:
                chunk.append(int(row))
            if len(chunk) == max(1, -(-most // ROUNDS)):
                break
        if not chunk:
            break
        gone += chunk
        free[:, own[chunk]] = False
    return free


def change(sums: Sums, own: np.ndarray, v) -> np.ndarray:
    """The estimate at `v` `[..., n, U + 1]` less that of leaving the units out, `[..., n]`."""
    g, q = _expanded(sums)
    alone = -np.eye(q.shape[-1])[own]
    return (quadratic_at(g, q, v) - quadratic_at(g, q, alone)).numpy()


def _expanded(sums: Sums) -> tuple[tf.Tensor, tf.Tensor]:
    """G and Q_c in double precision."""
    g = tf.cast(sums["g"], tf.float64)
    if "q" in sums:
        return g, tf.cast(sums["q"], tf.float64)
    sensitivity = tf.math.divide_no_nan(sums["s"], sums["rows"])
    a = tf.cast(sums["a"], tf.float64)
    return g, tf.cast(sensitivity, tf.float64)[:, None, None] * a[None]
