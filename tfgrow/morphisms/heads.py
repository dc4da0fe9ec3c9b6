"""Attention heads: split one in two, add one, or take one away.

An attention layer's output is a sum over its units (see `tfgrow.layers.attention`), each a context
times its part of the output projection. Whatever an edit does to contexts is computed exactly,
through the softmax, and linearised at the layer's output.

* `"heads"` splits a unit: its halves have the incoming weights w + theta and w - theta, and half of
  its output projection each: D = (1/2 [c(w + theta) + c(w - theta)] - c(w)) W.
* `"add_heads"` adds a unit with incoming weights theta and output projection phi: D = c(theta) phi,
  quadratic in phi, which has the closed form of `tfgrow.morphisms.add`.
* `"prune_heads"` takes a unit away. The other units' contexts and a constant stand in for its own,
  folded into their output projections and the output's bias: D = (sum_j c_j S_j + s - c) W. S is
  least squares in a Gauss-Newton metric in which little cancels (see `BLEND`). The gradient is left
  out of it: to follow that is to train the other units, and says nothing of the one that goes.

Source: Lawton et al., arXiv 2411.05855, after `split`, `add` and `prune`; that many heads can go:
Michel et al. 2019 (arXiv 1905.10650).

Layouts: contexts `[N, T, n, depth]`, their covectors `[1 + K, N, T, n, depth]`, output projections
`[n, depth, outputs]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrow.capture.execute import attention_call, tensor_tap
from tfgrow.curvature.normal import (
    cross_damping,
    dense_sums,
    kronecker_sums,
    outputs_trace,
    quadratic,
    solve_sums,
    zero_sums,
)
from tfgrow.morphisms.base import Candidate, Morphism, Perturbed
from tfgrow.morphisms.weights import root_mean_squares, typical
from tfgrow.types import NEWBORN, Cost, HeadsEdit, NewHeads, RemovedHeads

START = 0.5
"""Initial size of a split's theta, relative to the unit's weights."""

DENSE_LIMIT = 1024
"""Above so many output weights of a unit, or shares of what stands in for it, Q is factored."""

BLEND = 3.0
"""Weight of the factored curvature beside the whole one in the least squares of what stands in.

That errors of a stand-in at one position cancel those at another holds only as far as the network
is linear: a least squares that does not rely on it is truer, and no worse. 16 heads of a small
transformer on CIFAR-10, median relative error of the estimate and mean real change of the loss:
10.2 % and 0.0144 at 0, 7.8 % and 0.0140 at 1, 6.7 % and 0.0140 at 3, 5.1 % and 0.0143 at 10.
"""

SAMPLES = 32
"""So many samples of a batch are enough to tell how large Q is where it is factored."""

UNSEEN = "key_bias"
"""A bias of the keys adds the same to all scores of a query: the softmax does not see it."""

CANCELLED = "value_bias"
"""Of the halves of a unit without gate: each adds the opposite of what the other does."""


class OfHeads(Morphism):
    """What the edits of heads share."""

    reads_producer = False

    def reason(self, site):
        return site.heads_blocked

    def taps(self, site):
        return [tensor_tap(site.node.outputs[0])]

    def scale(self, site, units):
        del site, units
        return {}

    def projections(self, group, theta):
        """The output projections `[n, depth, outputs]` of what `perturb` returns."""
        del theta
        return tf.gather(group.site.producer.unit_projections(), group.units)

    def covectors(self, capture, group, theta, perturbed):
        del perturbed
        projections = tf.stop_gradient(self.projections(group, theta))
        pulled = tf.einsum("kbto,ndo->kbtnd", _cotangents(capture, group.site), projections)
        return {_output(group.site): pulled}

    def scalars(self, group, covectors, perturbed):
        place = _output(group.site)
        return tf.reduce_sum(covectors[place] * perturbed.values[place], axis=[2, 4])

    def slopes(self, group, weights, covectors):
        place = _output(group.site)
        return {place: tf.einsum("kbn,kbtnd->btnd", weights, covectors[place])}

    def tangents(self, group, theta, perturbed):
        place = _output(group.site)
        projections = tf.convert_to_tensor(self.projections(group, theta))
        change = tf.einsum("btnd,ndo->bto", perturbed.values[place], projections)
        inner = group.site.graph.tensors[place].shape[2:]
        shape = tf.concat([tf.shape(change)[:2], inner], axis=0)
        return {tensor_tap(place): tf.reshape(change, shape)}


class Heads(OfHeads):
    """Splits one unit into two. See the module's docstring."""

    name = "heads"

    def candidates(self, site, *, new_units, seed):
        del new_units
        rng = np.random.default_rng([seed, *site.name.encode()])
        scales, theta = _scales(site), {}
        for name, value in _incoming(site).items():
            if name == CANCELLED and "gate" not in scales:
                continue
            start = np.zeros(value.shape)
            if not name.endswith("_bias"):
                start = START * _column(scales[name], value) * rng.standard_normal(value.shape)
            theta[name] = start.astype("float32")
        return [
            Candidate(site, self.name, unit, {k: v[unit] for k, v in theta.items()}, {}, Cost())
            for unit in range(site.units)
        ]

    def scale(self, site, units):
        return {name: value[units] for name, value in _scales(site).items()}

    def perturb(self, capture, group, theta, responses, fresh):
        del responses, fresh
        live = group.site.producer.unit_weights()
        now = {name: tf.gather(value, group.units) for name, value in live.items()}
        plus, minus = ({k: v + s * theta.get(k, 0.0) for k, v in now.items()} for s in (1, -1))
        together = {k: tf.concat([plus[k], minus[k], v], axis=0) for k, v in now.items()}
        seen = _contexts(capture, group.site, together)
        count = len(group.units)
        first, second, old = (seen[:, :, i * count : (i + 1) * count] for i in range(3))
        return Perturbed({_output(group.site): 0.5 * (first + second) - old}, {})

    def edit(self, candidate):
        unit = candidate.unit
        now = {name: value[unit] for name, value in _live_weights(candidate.site).items()}
        halves = [
            NewHeads(
                source=unit,
                weights={k: v + sign * candidate.theta.get(k, 0.0) for k, v in now.items()},
                projection=0.5,
                gradient_scale=0.5,
            )
            for sign in (1.0, -1.0)
        ]
        return HeadsEdit(candidate.site, {unit: halves[0]}, (halves[1],))

    def scaled(self, candidate, alpha):
        theta = {name: alpha * value for name, value in candidate.theta.items()}
        return candidate.replace(theta=theta)


class AddHeads(OfHeads):
    """Adds one unit. See the module's docstring."""

    name = "add_heads"
    solved = ("phi",)
    edits_unit = False

    def candidates(self, site, *, new_units, seed):
        rng = np.random.default_rng([seed, 1, *site.name.encode()])
        scales, found = _scales(site), []
        for number in range(new_units):
            theta = {"phi": np.zeros(_shape(site)[1:])}
            for name, value in _incoming(site).items():
                theta[name] = np.zeros(value.shape[1:])
                if not name.endswith("_bias"):
                    theta[name] = typical(scales[name]) * rng.standard_normal(value.shape[1:])
            theta = {name: value.astype("float32") for name, value in theta.items()}
            found.append(Candidate(site, self.name, number, theta, {}, Cost()))
        return found

    def scale(self, site, units):
        return {
            name: np.full(len(units), typical(value), "float32")
            for name, value in _scales(site).items()
        }

    def projections(self, group, theta):
        return theta["phi"]

    def perturb(self, capture, group, theta, responses, fresh):
        del responses, fresh
        weights = {name: theta[name] for name in _incoming(group.site)}
        return Perturbed({_output(group.site): _contexts(capture, group.site, weights)}, {})

    def equations(self, capture, group, perturbed):
        contexts = perturbed.values[_output(group.site)]
        seen, cotangents = tf.transpose(contexts, (0, 2, 1, 3)), _cotangents(capture, group.site)
        live = _live_contexts(capture, group.site)
        energies = {
            "energy": tf.reduce_sum(contexts**2, axis=[0, 1, 3]),
            "usual": tf.reduce_sum(live**2) / group.site.units,
        }
        if _is_dense(group.site):
            return {**dense_sums([seen], [cotangents]), **energies}
        trace = _trace_of_q(seen, cotangents[1:])
        return {**kronecker_sums([seen], [cotangents]), **energies, "trace": trace}

    def no_equations(self, group):
        _, depth, outputs = _shape(group.site)
        count, dense = len(group.units), _is_dense(group.site)
        sums = zero_sums(count, [(depth, outputs)], dense)
        return sums if dense else {**sums, "trace": tf.zeros((count,))}

    def solve(self, group, sums, damping):
        phi = solve_sums(_to_scale(sums), damping)
        return {"phi": tf.reshape(phi, (-1, *_shape(group.site)[1:]))}

    def choose_damping(self, group, first, second):
        del group
        return cross_damping(_to_scale(first), _to_scale(second), solve_sums, quadratic)

    def edit(self, candidate):
        every = _live_weights(candidate.site)
        weights = {k: candidate.theta.get(k, np.zeros_like(v[0])) for k, v in every.items()}
        unit = NewHeads(NEWBORN, weights, np.asarray(candidate.theta["phi"]))
        return HeadsEdit(candidate.site, appended=(unit,))

    def scaled(self, candidate, alpha):
        return candidate.replace(theta={**candidate.theta, "phi": alpha * candidate.theta["phi"]})


class PruneHeads(OfHeads):
    """Takes one unit away. See the module's docstring."""

    name = "prune_heads"
    solved = ("share", "offset")
    units = -1

    def candidates(self, site, *, new_units, seed):
        del new_units, seed
        if site.units < 2:
            return []
        units, depth, _ = _shape(site)
        share, offset = np.zeros((units * depth, depth), "f"), np.zeros(depth, "f")
        theta = {"share": share, "offset": offset}
        return [Candidate(site, self.name, unit, dict(theta), {}, Cost()) for unit in range(units)]

    def perturb(self, capture, group, theta, responses, fresh):
        del responses, fresh
        if "share" not in theta:  # not solved yet, and nothing in it is improved by gradient
            return Perturbed({}, {})
        share = theta["share"] * _others(group)[:, :, None] - _itself(group)
        change = tf.einsum("btf,nfd->btnd", _flat_contexts(capture, group.site), share)
        return Perturbed({_output(group.site): change + theta["offset"]}, {})

    def equations(self, capture, group, perturbed):
        flat = _flat_contexts(capture, group.site)
        seen = tf.concat([flat, tf.ones_like(flat[..., :1])], axis=-1)  # [N, T, F]
        columns = self.covectors(capture, group, {}, perturbed)[_output(group.site)][1:]
        rows = tf.reshape(seen, (-1, seen.shape[2]))
        if _shares_are_dense(group):
            slopes = tf.einsum("btf,kbtnd->nkbfd", seen, columns)
            slopes = tf.reshape(slopes, (len(group.units), -1, seen.shape[2] * columns.shape[4]))
            return {
                "q": tf.matmul(slopes, slopes, transpose_a=True),
                "a": tf.matmul(rows, rows, transpose_a=True),
                "s": tf.einsum("kbtnd,kbtne->nde", columns, columns),
                "rows": tf.cast(tf.shape(rows)[0], tf.float32),
            }
        weight = tf.reduce_sum(columns**2, axis=[0, 4])  # how much each row matters, [N, T, n]
        weighted = tf.reshape(weight, (-1, 1, len(group.units))) * rows[:, :, None]
        return {"q": tf.einsum("rfn,rg->nfg", weighted, rows)}

    def no_equations(self, group):
        units, depth, _ = _shape(group.site)
        count, size = len(group.units), units * depth + 1
        if not _shares_are_dense(group):
            return {"q": tf.zeros((count, size, size)), "loss": tf.zeros(())}
        return {
            "q": tf.zeros((count, size * depth, size * depth)),
            "a": tf.zeros((size, size)),
            "s": tf.zeros((count, depth, depth)),
            "rows": tf.zeros(()),
            "loss": tf.zeros(()),
        }

    def solve(self, group, sums, damping):
        depth = _shape(group.site)[1]
        found = tf.reshape(_stand_in(group, sums, damping), (len(group.units), -1, depth))
        share = tf.cast(found[:, :-1], tf.float32) * _others(group)[:, :, None]
        return {"share": share, "offset": tf.cast(found[:, -1], tf.float32)}

    def choose_damping(self, group, first, second):
        return cross_damping(
            first,
            second,
            lambda sums, damping: _stand_in(group, sums, damping),
            lambda sums, found: _change(group, sums, found),
            generous=1.0,  # as of `prune`: the longer step is the smaller perturbation
        )

    def edit(self, candidate):
        theta = candidate.theta
        gone = RemovedHeads(np.asarray(theta["share"]), np.asarray(theta["offset"]))
        return HeadsEdit(candidate.site, removed={candidate.unit: gone})

    def scaled(self, candidate, alpha):
        return candidate if alpha == 1.0 else None

    def reliance(self, candidate, units):
        depth = len(candidate.theta["offset"])
        blocks = np.reshape(candidate.theta["share"], (-1, depth, depth))[np.asarray(units)]
        return np.abs(blocks).max(axis=(1, 2))


# ---- the layer ------------------------------------------------------------------------------


def _output(site) -> int:
    return site.node.outputs[0]


def _live_weights(site) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in site.producer.unit_weights().items()}


def _incoming(site) -> dict[str, Any]:
    """The weights that theta is about."""
    live = site.producer.unit_weights()
    return {name: value for name, value in live.items() if name != UNSEEN}


def _shape(site) -> tuple[int, int, int]:
    """Units, depth of a context, outputs."""
    return tuple(site.producer.unit_projections().shape)


def _contexts(capture, site, weights: Mapping):
    return site.producer.contexts(attention_call(site.node, capture.values), weights)


def _live_contexts(capture, site):
    return _contexts(capture, site, site.producer.unit_weights())


def _flat_contexts(capture, site):
    """The contexts of all of the layer's units side by side, `[N, T, units * depth]`."""
    live = _live_contexts(capture, site)
    size = live.shape[2] * live.shape[3]
    return tf.reshape(live, tf.concat([tf.shape(live)[:2], [size]], axis=0))


def _cotangents(capture, site):
    """Gradient and columns at the layer's output, `[1 + K, N, T, outputs]`."""
    stacked = capture.cotangents[tensor_tap(_output(site))]
    outputs = int(np.prod(stacked.shape[3:]))
    shape = tf.concat([tf.shape(stacked)[:3], [outputs]], axis=0)
    return tf.ensure_shape(tf.reshape(stacked, shape), (*stacked.shape[:3], outputs))


def _scales(site) -> dict[str, np.ndarray]:
    """Root mean square `[units]` of each unit's kernels, by name; a bias's is its kernel's."""
    weights, scales = _live_weights(site), {}
    for name in _incoming(site):
        kernel = weights[name.removesuffix("_bias")]
        scales[name] = root_mean_squares(kernel)
    return scales


def _column(scales: np.ndarray, like: np.ndarray) -> np.ndarray:
    return scales.reshape(-1, *[1] * (like.ndim - 1))


def _is_dense(site) -> bool:
    _, depth, outputs = _shape(site)
    return depth * outputs <= DENSE_LIMIT


def _trace_of_q(seen, columns):
    """The trace `[n]` of Q, from some of the samples.

    The weights of a unit serve at all positions of a sample, and their gradient is a sum over them,
    which may be many times as large as if they had nothing to do with each other.
    """
    samples = tf.shape(seen)[0]
    some = tf.minimum(samples, SAMPLES)
    seen, columns = seen[:some], columns[:, :some]
    alike = tf.matmul(seen, seen, transpose_b=True)  # [N, n, T, T]
    pulls = tf.reduce_sum(tf.matmul(columns, columns, transpose_b=True), axis=0)  # [N, T, T]
    share = tf.cast(samples, tf.float32) / tf.cast(some, tf.float32)
    return share * tf.einsum("inpq,ipq->n", alike, pulls)


def _to_scale(sums: Mapping) -> Mapping:
    """Sums whose factored Q is as large as it really is."""
    if "trace" not in sums:
        return sums
    as_factored = tf.linalg.trace(sums["a/0"]) * tf.cast(outputs_trace(sums), tf.float32)
    scale = tf.math.divide_no_nan(sums["trace"], as_factored)
    return {**sums, "a/0": sums["a/0"] * scale[:, None, None]}


# ---- what stands in for a unit ----------------------------------------------------------------


def _shares_are_dense(group) -> bool:
    units, depth, _ = _shape(group.site)
    return (units * depth + 1) * depth <= DENSE_LIMIT


def _itself(group) -> np.ndarray:
    """The rows of the unit's own context, as a map `[n, units * depth, depth]` onto it."""
    units, depth, _ = _shape(group.site)
    every = np.eye(units * depth, dtype="float32").reshape(-1, units, depth)
    return np.moveaxis(every[:, group.units], 1, 0)


def _others(group) -> np.ndarray:
    """1 at the rows of the other units' contexts, `[n, units * depth]`."""
    return 1.0 - _itself(group).sum(axis=2)


def _fixed_and_free(group) -> tuple[np.ndarray, np.ndarray]:
    """What is subtracted, `[n, W, R]`, and which entries `[n, W]` may stand in for it.

    With Q factored, `W` is the contexts and a constant, and each entry of the unit's own context is
    a right-hand side; else all of them lie in one.
    """
    itself, others = _itself(group), _others(group)
    count, _, depth = itself.shape
    constant = float(group.site.producer.output_projection.bias is not None)
    fixed = np.concatenate([-itself, np.zeros((count, 1, depth))], axis=1)
    free = np.concatenate([others, np.full((count, 1), constant)], axis=1)
    if _shares_are_dense(group):
        return fixed.reshape(count, -1, 1), np.repeat(free, depth, axis=1)
    return fixed, free


def _stand_in(group, sums: Mapping, damping):
    """The least squares `[n, W, R]`, what is subtracted included; `[D, n, W, R]` of `[D, 1]`."""
    q = _blended(sums)
    fixed, free = _fixed_and_free(group)
    inner = q * free[:, :, None] * free[:, None, :]
    pull = -free[:, :, None] * tf.matmul(q, fixed)
    diagonal = tf.linalg.diag_part(inner)
    mean = tf.math.divide_no_nan(tf.reduce_sum(diagonal, -1), free.sum(axis=-1))
    ridge = tf.maximum(tf.cast(damping, tf.float64) * mean, 1e-30)

    def solve(ridge):
        extra = ridge[..., None] * free + (1.0 - free)
        factor = tf.linalg.cholesky(tf.linalg.set_diag(inner, diagonal + extra))
        return tf.linalg.cholesky_solve(factor, pull) * free[:, :, None] + fixed

    return solve(ridge) if ridge.shape.rank == 1 else tf.stack([*map(solve, tf.unstack(ridge))])


def _blended(sums: Mapping):
    """The curvature that the least squares are taken in; see `BLEND`."""
    if "a" not in sums:  # factored as it is: each row by itself
        return tf.cast(sums["q"], tf.float64)
    q, a, s, rows = (tf.cast(sums[name], tf.float64) for name in ("q", "a", "s", "rows"))
    factored = tf.einsum("fg,nde->nfdge", tf.math.divide_no_nan(a, rows), s)
    return q + BLEND * tf.reshape(factored, tf.shape(q))


def _change(group, sums: Mapping, found) -> np.ndarray:
    """What the least squares gain on the sums' data against nothing standing in, `[D, n]`."""
    q = tf.cast(sums["q"], tf.float64)

    def squares(v):
        return 0.5 * tf.reduce_sum(v * tf.matmul(q, v), axis=[-2, -1])

    fixed, _ = _fixed_and_free(group)
    return (squares(found) - squares(tf.constant(fixed))).numpy()
