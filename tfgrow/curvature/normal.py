"""Quadratics in outgoing weights: their sums over data, and their damped minimisers.

For weights phi of a new unit, the estimate is `G.phi + 1/2 phi'Q phi`. With `u` the inputs the
weights see and `c` a cotangent of the response they make, the gradient of one sample is
`sum_p u_p c_p'`; `G` sums it for the loss gradient, `Q` its outer products over the columns.

Layouts: `seen` is `[N, n, P, A]` per consumer (A = T*B), its cotangents `[1 + K, N, P, O]` with the
gradient first; weights of all consumers are flattened and joined to `[n, W]`, `W = sum A*O`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfgrow.curvature.sketch import SKETCHED, sketch, solve_by_sketch

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Dampings relative to the mean diagonal of Q, tried by `cross_damping`, in ascending order."""

GENEROUS = 0.9
"""Share of the best crossed gain that a larger damping must keep to be preferred.

The quadratic is flat near its minimum and the true loss is not: shorter steps give away little of
the estimate and are much truer to it. Added units of a VGG on CIFAR-10, estimated against true
change: Pearson 0.58 at damping 0.1, 0.77 at 0.3, 0.95 at 1, for true changes of equal size.
"""

LEARNING_DAMPING = 0.3
"""Relative damping of the closed forms while learning; halves of the data choose the final one."""

LEAST_ENERGY = 0.1
"""A unit that fires less is damped as one that fires so much, relative to its site's live units.

Damping is relative to a unit's own curvature. One that is silent on nearly all samples has next to
none, and would get outgoing weights that wreck the loss on the few samples it fires on.
"""

MOST_GAIN = 0.5
"""Largest share of the loss that one unit's weights may promise to take away.

Where a loss is locally linear its quadratic has no minimum (Huber far from the target); a loss that
is never negative cannot fall by more than it is.
"""

WIDE = 256
"""Up to so many outputs of a consumer, the eigenvalues of S take no time."""

FEW_SYSTEMS = 16
"""Of more outputs, so many damped systems are solved sooner one by one than by eigenvalues.

For 2048 outputs a Cholesky factor takes 0.6 s where the eigenvalues take 25 s.
"""

Sums = Mapping[str, tf.Tensor]


def zero_sums(units: int, sizes: Sequence[tuple[int, int]], dense: bool) -> dict[str, tf.Tensor]:
    """Sums of no data at all, for consumers with weights of `sizes` `(A, O)`.

    Beside G and Q they hold the `energy` `[n]` of what the units hand to the consumers (the sum of
    its squares), the mean of the same over the live units (`usual`), and the sum of the `loss`.
    """
    weights = sum(a * o for a, o in sizes)
    sums = {"g": tf.zeros((units, weights)), "energy": tf.zeros((units,))}
    sums |= {"usual": tf.zeros(()), "loss": tf.zeros(())}
    if dense:
        return {**sums, "q": tf.zeros((units, weights, weights))}
    for index, (a, o) in enumerate(sizes):
        sums[f"a/{index}"] = tf.zeros((units, a, a))
        sums |= outputs_sums(tf.zeros((0, o)), index)
        sums[f"rows/{index}"] = tf.zeros(())
    return sums


def is_factored(sums: Sums) -> bool:
    """Whether Q is factored: what different positions say of it together is left out then.

    Where units fire alike at all positions and are read alike (before an average over positions)
    that is most of it, and the closed form several times too long.
    """
    return "rows/0" in sums


def scale_sums(sums: Sums, factor: float) -> dict[str, tf.Tensor]:
    """Sums whose data count `factor` as much: forgets slowly what earlier batches said."""
    return {
        name: (factor**0.5 if name.startswith("y/") else factor) * value
        for name, value in sums.items()
    }


def dense_sums(seen: Sequence, cotangents: Sequence) -> dict[str, tf.Tensor]:
    """Sums of one batch with the whole of Q: `{"g": [n, W], "q": [n, W, W]}`."""
    parts = [_sample_gradients(u, c) for u, c in zip(seen, cotangents, strict=True)]
    gradients = tf.concat(parts, axis=-1)  # [n, 1 + K, N, W]
    columns = tf.reshape(gradients[:, 1:], (gradients.shape[0], -1, gradients.shape[-1]))
    q = tf.matmul(columns, columns, transpose_a=True)
    return {"g": tf.reduce_sum(gradients[:, 0], axis=1), "q": q}


def kronecker_sums(seen: Sequence, cotangents: Sequence) -> dict[str, tf.Tensor]:
    """Sums of one batch with Q factored per consumer, `Q ~ A x S` (Grosse & Martens 2016).

    Of consumers of very many outputs, S is kept as a sketch `y/...`.
    """
    parts, sums = [], {}
    for index, (u, c) in enumerate(zip(seen, cotangents, strict=True)):
        total = tf.einsum("inpa,ipo->nao", u, c[0])
        parts.append(tf.reshape(total, (-1, total.shape[1] * total.shape[2])))
        rows = tf.reshape(c[1:], (-1, c.shape[-1]))
        sums[f"a/{index}"] = tf.einsum("inpa,inpb->nab", u, u)
        sums |= outputs_sums(rows, index)
        sums[f"rows/{index}"] = tf.cast(tf.size(c[0]) / c.shape[-1], tf.float32)
    return {"g": tf.concat(parts, axis=-1), **sums}


def outputs_sums(rows, index: int = 0) -> dict[str, tf.Tensor]:
    """A consumer's S of some rows `[r, O]` of columns, or its sketch, under the name it goes by."""
    if rows.shape[-1] > SKETCHED:
        return {f"y/{index}": sketch(rows)}
    return {f"s/{index}": tf.matmul(rows, rows, transpose_a=True)}


def _sample_gradients(u, c):
    """`[n, 1 + K, N, A*O]`: every sample's gradient with respect to the weights."""
    passes, outputs = c.shape[0], c.shape[3]
    sample_first = tf.transpose(c, (1, 2, 0, 3))
    flat = tf.reshape(sample_first, (-1, 1, tf.shape(c)[2], passes * outputs))
    outer = tf.matmul(u, flat, transpose_a=True)  # [N, n, A, (1 + K) * O]
    outer = tf.reshape(outer, (-1, u.shape[1], u.shape[3], passes, outputs))
    outer = tf.transpose(outer, (1, 3, 0, 2, 4))
    return tf.reshape(outer, (u.shape[1], passes, -1, u.shape[3] * outputs))


def solve_factored(sums: Sums, damping) -> tf.Tensor:
    """`solve_sums` for one consumer with Q factored, and damping factored too.

    Each factor is damped by the root of the relative damping (Martens & Grosse 2015, section 6.3),
    which needs no eigenvectors: for wide layers they take ten times as long as the rest.

    Args:
      sums: see `solve_sums`.
      damping: relative damping, a number; or several of them `[D, 1]`, for `phi [D, n, W]`.
    """
    if np.ndim(damping):
        return tf.stack([solve_factored(sums, one) for one in np.ravel(damping)])
    a, outputs = tf.cast(sums["a/0"], tf.float64), _outputs_factor(sums, 0)
    g = tf.reshape(tf.cast(sums["g"], tf.float64), (-1, a.shape[-1], outputs.shape[-1]))
    half = tf.linalg.cholesky_solve(_damped_cholesky(a, damping**0.5), g)
    if "y/0" in sums:
        ridge = _ridge(damping**0.5, outputs_trace(sums) / outputs.shape[-1])
        solved = solve_by_sketch(tf.ones_like(half[:, :, 0]), outputs, ridge[None], half)
    else:
        second = _damped_cholesky(outputs[None], damping**0.5)
        solved = tf.linalg.cholesky_solve(second, tf.linalg.matrix_transpose(half))
        solved = tf.linalg.matrix_transpose(solved)
    return _bounded(sums, -tf.reshape(solved, (-1, g.shape[1] * g.shape[2])))


def _damped_cholesky(matrix, damping):
    diagonal = tf.linalg.diag_part(matrix)
    ridge = _ridge(damping, tf.reduce_mean(diagonal, axis=-1, keepdims=True))
    return tf.linalg.cholesky(tf.linalg.set_diag(matrix, diagonal + ridge))


def _ridge(damping, mean):
    return tf.maximum(damping * mean, 1e-30)


def _bounded(sums: Sums, phi) -> tf.Tensor:
    """The weights, shortened if they promise more than `MOST_GAIN`; in float32."""
    gain = -_quadratic(sums, phi)
    most = MOST_GAIN * tf.cast(sums["loss"], tf.float64)
    share = tf.where((gain > most) & (most > 0), most / gain, 1.0)
    return tf.cast(phi * share[..., None], tf.float32)


def solve_sums(sums: Sums, damping) -> tf.Tensor:
    """`phi [n, W] = -(Q + damping * mean(diag Q))^-1 G`.

    Args:
      sums: from `dense_sums` or `kronecker_sums`, added up over batches.
      damping: relative damping, a number or one per unit `[n]`; or several of them `[D, n]` (or
        `[D, 1]`), which gives `phi [D, n, W]`.
    """
    g = tf.cast(sums["g"], tf.float64)
    rarity = LEAST_ENERGY * tf.math.divide_no_nan(sums["usual"], sums["energy"])
    damping = tf.cast(damping, tf.float64) * tf.cast(tf.maximum(rarity, 1.0), tf.float64)
    if "q" in sums:
        phi = _solve_dense(g, tf.cast(sums["q"], tf.float64), damping)
    else:
        phi = _solve_kronecker(g, sums, damping)
    return _bounded(sums, phi)


def _solve_dense(g, q, damping):
    # a dead unit has Q = 0 and G = 0: the floor keeps 0/0 from becoming NaN
    ridge = tf.maximum(damping * tf.reduce_mean(tf.linalg.diag_part(q), axis=-1), 1e-30)
    return -damped_solve(q, ridge[..., None], g)


def damped_solve(q, extra, right) -> tf.Tensor:
    """The solutions `x [n, W]` of `(Q + diag(extra)) x = right`.

    Args:
      q: `[n, W, W]`, not negative.
      extra: `[n, W]` or `[n, 1]`, positive; or several of them, `[D, n, ...]`, for `x [D, n, W]`.
      right: `[n, W]`.
    """
    diagonal = tf.linalg.diag_part(q)

    def solve(extra):
        factor = tf.linalg.cholesky(tf.linalg.set_diag(q, diagonal + extra))
        return tf.linalg.cholesky_solve(factor, right[..., None])[..., 0]

    # one after the other: Q is large, and all of its factors at once would be many times as large
    return solve(extra) if extra.shape.rank == 2 else tf.stack([*map(solve, tf.unstack(extra))])


def quadratic_at(g, q, x):
    """`g.x + 1/2 x'Q x`, `[..., n]`."""
    return tf.reduce_sum(g * x, axis=-1) + 0.5 * tf.reduce_sum(tf.linalg.matvec(q, x) * x, axis=-1)


def _solve_kronecker(g, sums, damping):
    parts, start = [], 0
    for index in range(_consumers(sums)):
        a, outputs = tf.cast(sums[f"a/{index}"], tf.float64), _outputs_factor(sums, index)
        size = a.shape[-1] * outputs.shape[-1]
        block = tf.reshape(g[:, start : start + size], (-1, a.shape[-1], outputs.shape[-1]))
        start += size
        mean = tf.reduce_mean(tf.linalg.diag_part(a), axis=-1)
        mean *= outputs_trace(sums, index) / outputs.shape[-1]
        ridge = _ridge(damping, mean)
        a_values, a_vectors = _eigh(a)
        rotated = tf.einsum("nab,nao->nbo", a_vectors, block)
        solve = _outputs_solver(sums, index, (ridge.shape.num_elements() or np.inf) * a.shape[-1])
        solved = -tf.einsum(
            "nab,...nbo->...nao", a_vectors, solve(tf.nn.relu(a_values), outputs, ridge, rotated)
        )
        parts.append(tf.reshape(solved, (*ridge.shape, size)))
    return tf.concat(parts, axis=-1)


def _outputs_solver(sums, index: int, systems: float) -> Callable:
    """How systems with a consumer's S are solved soonest."""
    if f"y/{index}" in sums:
        return solve_by_sketch
    wide = sums[f"s/{index}"].shape[-1] > WIDE
    return _solve_by_cholesky if systems <= FEW_SYSTEMS and wide else _solve_by_eigenvalues


def _eigh(matrix):
    """Eigenvalues and eigenvectors; of wide matrices on the CPU by LAPACK, three times as fast."""
    wide = tf.executing_eagerly() and matrix.shape[-1] > WIDE and "GPU" not in matrix.device
    if not wide:
        return tf.linalg.eigh(matrix)
    values, vectors = np.linalg.eigh(matrix.numpy())
    return tf.constant(values), tf.constant(vectors)


def _solve_by_eigenvalues(a_values, s, ridge, right):
    """`x [..., n, A, O]` of `(a_values x S + ridge) x = right`, all dampings from one S."""
    s_values, s_vectors = _eigh(s)
    eigenvalues = a_values[:, :, None] * tf.nn.relu(s_values)
    rotated = tf.einsum("nbo,oq->nbq", right, s_vectors)
    rotated = rotated / (eigenvalues + ridge[..., None, None])
    return tf.einsum("...nbq,oq->...nbo", rotated, s_vectors)


def _solve_by_cholesky(a_values, s, ridge, right):
    """The same, one system after the other."""
    count, outputs = a_values.shape.num_elements(), s.shape[-1]
    extra = tf.repeat(ridge, a_values.shape[-1], axis=-1)[..., None]
    q = tf.reshape(a_values, (count, 1, 1)) * s
    solved = damped_solve(q, extra, tf.reshape(right, (count, outputs)))
    return tf.reshape(solved, (*ridge.shape, a_values.shape[-1], outputs))


def _consumers(sums: Sums) -> int:
    return sum(1 for name in sums if name.startswith("a/"))


def _outputs_factor(sums: Sums, index: int):
    """A consumer's S, or its sketch; for one row, in float64."""
    rows = tf.maximum(tf.cast(sums[f"rows/{index}"], tf.float64), 1.0)  # no data are no rows
    if f"y/{index}" in sums:
        return tf.cast(sums[f"y/{index}"], tf.float64) / tf.sqrt(rows)
    return tf.cast(sums[f"s/{index}"], tf.float64) / rows


def outputs_trace(sums: Sums, index: int = 0):
    """The trace of a consumer's S for one row, in float64."""
    factor = _outputs_factor(sums, index)
    return tf.reduce_sum(factor**2) if f"y/{index}" in sums else tf.linalg.trace(factor)


def quadratic(sums: Sums, phi) -> np.ndarray:
    """`G.phi + 1/2 phi'Q phi` for the sums' data (a sum over its samples), per unit `[..., n]`."""
    return _quadratic(sums, tf.cast(phi, tf.float64)).numpy()


def _quadratic(sums: Sums, phi):
    g = tf.cast(sums["g"], tf.float64)
    if "q" in sums:
        return quadratic_at(g, tf.cast(sums["q"], tf.float64), phi)
    linear = tf.reduce_sum(g * phi, axis=-1)
    curvature, start = tf.zeros_like(linear), 0
    for index in range(_consumers(sums)):
        a, outputs = tf.cast(sums[f"a/{index}"], tf.float64), _outputs_factor(sums, index)
        size = a.shape[-1] * outputs.shape[-1]
        block = phi[..., start : start + size]
        block = tf.reshape(block, (*block.shape[:-1], a.shape[-1], outputs.shape[-1]))
        start += size
        if f"y/{index}" in sums:
            block = tf.einsum("...nao,ko->...nak", block, outputs)
            seen = tf.einsum("nab,...nbk->...nak", a, block)
        else:
            seen = tf.einsum("nab,...nbq,oq->...nao", a, block, outputs)
        curvature += tf.reduce_sum(block * seen, axis=(-2, -1))
    return linear + 0.5 * curvature


def add_sums(first: Sums, second: Sums) -> dict[str, tf.Tensor]:
    """Sums over the data of both."""
    return {name: first[name] + second[name] for name in first}


def cross_damping(
    first: Sums, second: Sums, solve: Callable, change: Callable, generous: float = GENEROUS
) -> np.ndarray:
    """The damping `[n]` at which the solution on either half does well on the other.

    It is the largest of `DAMPINGS` that keeps the share `generous` of the best one's gain.

    Args:
      first: sums over one half of the data.
      second: sums over the other.
      solve: (sums, dampings `[D, 1]`) -> the solutions on them, such as `solve_sums`.
      change: (sums, solutions) -> `[D, n]`, the change that they promise on the sums' data against
        no step at all, such as `quadratic`.
      generous: see above.
    """
    dampings = np.asarray(DAMPINGS)[:, None]
    forth = change(second, solve(first, dampings))
    back = change(first, solve(second, dampings))
    gains = -(forth + back)
    best = np.max(gains, axis=0)
    # where no damping gains anything, the largest does the least harm
    keeps = (gains >= generous * best) | (best <= 0)
    last = len(DAMPINGS) - 1 - np.argmax(keeps[::-1], axis=0)
    return np.asarray(DAMPINGS)[last]
