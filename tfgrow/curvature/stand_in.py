"""Quadratics in what stands in for a unit: their sums over data, and their damped minimisers.

When unit c of a site goes, its values become `sum_j v_j a_j`, where a_j are the values of the
site's units and a last one is the constant 1: v_c is -1 in the *change* of the unit's values, and
the other entries are free. The estimate is `g_c.v + 1/2 v'Q_c v`, with the derivatives taken at the
unit's own channel of what the consumers read; that with respect to the constant is given, for a
constant acts behind the consumers, where there is no border.

What is minimised is not quite the estimate but `PULL g_c.v + 1/2 v'(Q_c + BLEND s_c A) v`, with A
the products of the values with each other and s_c the mean square of the unit's columns. `s_c A` is
what K-FAC takes for Q_c: errors at one position can't cancel those at another. That they cancel
holds only as far as the network is linear, so relying on it less is truer.

Layouts: units under study `n`, all of the site's units `U`; `values` `[N, P, U, B]` per leaf and
its covectors `[1 + K, N, P, n, B]`, the gradient first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfgrow.curvature.normal import damped_solve, quadratic_at

DENSE_LIMIT = 4096
"""Above so many pairs of a unit under study and a unit that may stand in, Q_c is factored.

Then nothing larger than `[U + 1, U + 1]` is ever made, and one eigendecomposition serves all units.
"""

PULL = 0.7
"""Share of the gradient that is followed: 0.7 of the way to the minimum brings 91 % of its gain.

Single removals of a VGG on CIFAR-10, median relative error of the estimate: 18 % at 1, 10 % at 0.7.
"""

BLEND = 0.3
"""Weight of the factored curvature beside the whole one. On the same network the error is 7 % with
it, and the real loss after a removal about the same; see docs/fidelity.md."""

STANDS_IN = 0.1
"""Units that go together must not hang on each other: largest share of one in another's place."""

SPARE = 8
"""So many more random vectors than a matrix has rank, to be sure of its space."""

NEGLIGIBLE = 1e-5
"""Share of a matrix's trace that rounding in float32 makes of nothing."""

ROUNDS = 8
"""Backward elimination takes so many rounds, whatever the number of units."""

SAMPLES = 4
"""Of each batch, that a factored Q_c takes its size from."""

Sums = Mapping[str, tf.Tensor]


def zero_sums(studied: int, units: int) -> dict[str, tf.Tensor]:
    """Sums of no data at all, for `studied` of a site's `units`."""
    size = units + 1
    sums = {
        "g": tf.zeros((studied, size)),
        "a": tf.zeros((size, size)),
        "rows": tf.zeros(()),
        "loss": tf.zeros(()),
    }
    if _dense(studied, size):
        return {**sums, "s": tf.zeros((studied,)), "q": tf.zeros((studied, size, size))}
    return {**sums, "trace": tf.zeros((studied,)), "energy": tf.zeros(())}


def _dense(studied: int, size: int) -> bool:
    return studied * size <= DENSE_LIMIT


def stand_in_sums(
    values: Sequence, covectors: Sequence, constant: tf.Tensor | None = None
) -> dict[str, tf.Tensor]:
    """Sums of one batch, over the leaves of a site.

    `{"g": [n, U + 1], "a": [U + 1, U + 1], "rows": []}`: the products of the values with the
    gradient and with each other, over so many rows; and where it is not too large the whole of
    `"q"` `[n, U + 1, U + 1]` beside the squares of the columns, `"s"` `[n]`. Else it is taken for a
    multiple of `a`: some of the samples say by its `"trace"` `[n]` and theirs, the `"energy"`, of
    which.

    Args:
      values: see the module.
      covectors: see the module.
      constant: `[1 + K, N, n]`, the derivatives with respect to the constant; None where there can
        be none, and then its entries are 0.
    """
    size, studied = values[0].shape[2] + 1, covectors[0].shape[3]
    if constant is None:
        constant = tf.zeros((covectors[0].shape[0], tf.shape(values[0])[0], studied))
    sums: dict[str, tf.Tensor] = {}
    for v, c in zip(values, covectors, strict=True):
        rows = tf.reshape(tf.transpose(v, (0, 1, 3, 2)), (-1, size - 1))
        slope = tf.reshape(tf.transpose(c[0], (2, 0, 1, 3)), (studied, -1))
        ones = tf.concat([rows, tf.ones_like(rows[:, :1])], axis=1)
        part = {
            "g": tf.matmul(slope, rows),
            "a": tf.matmul(ones, ones, transpose_a=True),
            "rows": tf.cast(tf.shape(rows)[0], tf.float32),
        }
        sums = {name: sums[name] + part[name] if sums else part[name] for name in part}
    slope = tf.reduce_sum(constant[0], axis=0)
    sums["g"] = tf.concat([sums["g"], slope[:, None]], axis=1)
    pairs = [(v, c[1:]) for v, c in zip(values, covectors, strict=True)]
    if _dense(studied, size):
        scalars = tf.add_n([_products(*pair) for pair in pairs])
        scalars = tf.concat([scalars, constant[1:, :, :, None]], axis=3)
        columns = tf.reshape(tf.transpose(scalars, (2, 0, 1, 3)), (studied, -1, size))
        sums["q"] = tf.matmul(columns, columns, transpose_a=True)
        sums["s"] = tf.add_n([tf.reduce_sum(c**2, axis=[0, 1, 2, 4]) for _, c in pairs])
    else:
        sums |= _traces([(v[:SAMPLES], c[:, :SAMPLES]) for v, c in pairs])
    return sums


def _by_sample(values, columns):
    """Values and columns with all positions in a row: `[N, P, U]` and `[N, K * n, P]`."""
    passes, size, studied = columns.shape[0], values.shape[2], columns.shape[3]
    along = tf.shape(values)[1] if values.shape[1] is None else values.shape[1]
    positions = along * values.shape[3]
    rows = tf.reshape(tf.transpose(values, (0, 1, 3, 2)), (-1, positions, size))
    slopes = tf.transpose(columns, (1, 0, 3, 2, 4))  # [N, K, n, P, B]
    return rows, tf.reshape(slopes, (-1, passes * studied, positions))


def _products(values, columns):
    """`[K, N, n, U]`: every sample's derivative with respect to v, by column."""
    rows, slopes = _by_sample(values, columns)
    shape = (-1, columns.shape[0], columns.shape[3], values.shape[2])
    return tf.transpose(tf.reshape(tf.matmul(slopes, rows), shape), (1, 0, 2, 3))


def _traces(pairs: Sequence[tuple]) -> dict[str, tf.Tensor]:
    """The traces of Q_c `[n]` and of A on some samples, both without the constant.

    A share acts at all positions of a sample, and its derivative is a sum over them: many times as
    large as if they had nothing to do with each other.
    """
    parts = [_by_sample(*pair) for pair in pairs]
    rows = tf.concat([part[0] for part in parts], axis=1)
    slopes = tf.concat([part[1] for part in parts], axis=2)
    if rows.shape[1] is not None and rows.shape[1] < rows.shape[2]:  # less to keep in mind
        alike = tf.matmul(rows, rows, transpose_b=True)
        squares = tf.reduce_sum(tf.matmul(slopes, alike) * slopes, axis=(0, 2))
    else:
        squares = tf.reduce_sum(tf.matmul(slopes, rows) ** 2, axis=(0, 2))
    by_unit = tf.reshape(squares, (-1, pairs[0][1].shape[3]))
    return {"trace": tf.reduce_sum(by_unit, axis=0), "energy": tf.reduce_sum(rows**2)}


def solve(sums: Sums, free: np.ndarray, own: np.ndarray, damping) -> np.ndarray:
    """The minimising `v` (see the module), with -1 at the unit itself and 0 where it is not free.

    Args:
      sums: from `stand_in_sums`, added up over batches.
      free: bool `[U + 1]`, which entries may differ from 0.
      own: int `[n]`, each unit's own entry.
      damping: relative to the mean diagonal of the curvature, a number or one per unit `[n]`; or
        several of them `[D, 1]`.

    Returns:
      Float64 `[n, U + 1]`, or `[D, n, U + 1]`.
    """
    damping = np.asarray(damping, dtype=np.float64)
    return (_solve_whole if "q" in sums else _solve_factored)(sums, free, own, damping)


def _solve_whole(sums, free, own, damping):
    g, q, a = (_double(sums[name]) for name in ("g", "q", "a"))
    q = q + BLEND * _sensitivity(sums)[:, None, None] * a
    itself = np.eye(len(free))[own]
    mask = free * (1.0 - itself)
    inner = q * mask[:, :, None] * mask[:, None, :]
    pull = mask * (np.einsum("nij,nj->ni", q, itself) - PULL * g)
    diagonal = np.einsum("nii->n", inner)
    ridge = _ridge(damping, diagonal, mask.sum(axis=-1))
    extra = tf.constant(ridge[..., None] * mask + (1.0 - mask))
    return damped_solve(inner, extra, pull).numpy() * mask - itself


def _solve_factored(sums, free, own, damping):
    """All units share A, which is taken apart once, whatever their number and their dampings.

    A unit's own entry is held at 0 by a multiplier: with `P = (A + ridge)^-1` the solution without
    the entry c is `P b - P e_c (P b)_c / P_cc`.
    """
    g, a = (_double(sums[name]) for name in ("g", "a"))
    stay = np.flatnonzero(free)
    itself = (own[:, None] == stay).astype(np.float64)
    shared = a[np.ix_(stay, stay)]
    eigenvalues, vectors = _eigen(shared, int(sums["rows"]))
    slope = PULL * _ratio(g[:, stay], (1.0 + BLEND) * _sensitivity(sums)[:, None])
    pull = (a[np.ix_(own, stay)] - slope) * (1.0 - itself)
    others = (1.0 - itself) @ np.diag(shared)
    ridge = _ridge(damping, others, len(stay) - itself.sum(axis=-1))
    along, own_way = (_inverse(eigenvalues, vectors, ridge, part) for part in (pull, itself))
    mine, own_size = ((itself * part).sum(axis=-1, keepdims=True) for part in (along, own_way))
    along -= own_way * _ratio(mine, own_size)
    v = np.zeros((*ridge.shape, len(free)))
    v[..., stay] = along * (1.0 - itself)
    v[..., np.arange(len(own)), own] = -1.0
    return v


def _eigen(a: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues `[r]` and vectors `[U, r]` of a sum of `rank` outer products.

    Of few rows, as wide layers see them, those that are not 0: their space is found by products
    with random vectors, which is exact and far less work than to take a matrix of thousands apart.
    """
    if 2 * (rank + SPARE) <= len(a):
        drawn = np.random.default_rng(0).normal(size=(len(a), rank + SPARE))
        space, _ = np.linalg.qr(a @ drawn)
        values, vectors = np.linalg.eigh(space.T @ a @ space)
        if np.trace(a) - values.sum() <= NEGLIGIBLE * np.trace(a):  # nothing is left out
            return values, space @ vectors
    return np.linalg.eigh(a)


def _inverse(eigenvalues, vectors, ridge, right):
    """`(A + ridge)^-1 right`, where A is 0 outside of the vectors' space: `[..., n, U]`."""
    inside = right @ vectors
    outside = right - inside @ vectors.T if vectors.shape[1] < len(vectors) else 0.0
    ridge = ridge[..., None]
    return inside / (np.maximum(eigenvalues, 0.0) + ridge) @ vectors.T + outside / ridge


def spread_out(sums: Sums, free: np.ndarray, own: np.ndarray, damping, most: int) -> np.ndarray:
    """Which entries may be used if up to `most` units are to go together: bool `[U + 1]`.

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
    gone: list[int] = []
    while len(gone) < min(most, len(own) - 1):
        v = solve(sums, free, own, damping)
        cost = _value(sums, v)
        standing = np.abs(v)
        standing[np.arange(len(own)), own] = 0.0
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
        free[own[chunk]] = False
    return free


def change(sums: Sums, own: np.ndarray, v) -> np.ndarray:
    """The estimate at `v` `[..., n, U + 1]` less that of leaving the units out, `[..., n]`."""
    alone = -np.eye(sums["g"].shape[-1])[own]
    return _value(sums, np.asarray(v)) - _value(sums, alone)


def _value(sums: Sums, v: np.ndarray) -> np.ndarray:
    """`g_c.v + 1/2 v'Q_c v`, `[..., n]`."""
    g = _double(sums["g"])
    if "q" in sums:
        return quadratic_at(g, _double(sums["q"]), v).numpy()
    curvature = _sensitivity(sums) * ((v @ _double(sums["a"])) * v).sum(axis=-1)
    return (g * v).sum(axis=-1) + 0.5 * curvature


def _sensitivity(sums: Sums) -> np.ndarray:
    """What Q_c has on A, `[n]`: where it is factored, so that it is as large as it really is."""
    if "trace" in sums:
        return _ratio(_double(sums["trace"]), _double(sums["energy"]))
    return _ratio(_double(sums["s"]), _double(sums["rows"]))


def _ridge(damping: np.ndarray, diagonal: np.ndarray, entries: np.ndarray) -> np.ndarray:
    # a unit that nothing depends on has no curvature: the floor keeps 0/0 from becoming NaN
    return np.maximum(damping * diagonal / np.maximum(entries, 1.0), 1e-30)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the divisor is."""
    shape = np.broadcast_shapes(np.shape(above), np.shape(below))
    return np.divide(above, below, out=np.zeros(shape), where=below != 0)


def _double(value) -> np.ndarray:
    return np.asarray(value, dtype=np.float64)
