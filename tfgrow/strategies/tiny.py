"""TINY: new units that do what the layer after them would want and cannot do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrow.capture.batches import Batch
from tfgrow.capture.capture import Capture, consumer_taps
from tfgrow.capture.execute import input_tap, linear_tap
from tfgrow.capture.path import Path, needs_moments
from tfgrow.estimator import compiled_loss
from tfgrow.graph.convert import check_ties, copy_model
from tfgrow.graph.nodes import Node
from tfgrow.graph.sites import Site, find_sites, response_id
from tfgrow.growth import edits_of
from tfgrow.measure import real_loss
from tfgrow.morphisms.base import Candidate, perturb_all
from tfgrow.morphisms.path_state import state_moments
from tfgrow.morphisms.registry import group_candidates
from tfgrow.strategies.base import Room
from tfgrow.strategies.linear_units import (
    MOST_WEIGHTS,
    Directions,
    LinearStrategy,
    LinearUnits,
    as_candidates,
    captures,
    incoming_norm,
    normalised,
    slices,
)
from tfgrow.strategies.statistics import measured
from tfgrow.surgery.apply import apply_edits
from tfgrow.surgery.transaction import growth_transaction

NEGLIGIBLE = 1e-3
"""Units that do less than this of the wanted update (of its root mean square) are none."""

RANK = 1e-6
"""Eigenvalues of second moments under this share of the largest are rounding."""

DOUBLINGS = 12
"""How often the amplitude is doubled, or halved, at most."""


class Tiny(LinearStrategy):
    """New units for the part of the wanted update that the layer after them cannot do itself.

    Source: Verbockhaven, Rudkiewicz, Chevallier, Charpiat 2024, "Growing Tiny Networks: Spotting
    Expressivity Bottlenecks and Fixing Them Optimally", arXiv 2405.19816. Wanted at the consumer's
    response is `V`, minus the loss gradient there. What its weights could do of it on their inputs
    B is taken off, by least squares: `V_p = V - dW B`. With `h` what the producer reads, and a 1
    for the bias, `S = E[h h']` and `N = E[h V_p']`, the units that do most of the rest, where the
    activation is linear, are the first of `S^-1/2 N = sum l_k u_k v_k'`: incoming weights
    `l_k^1/2 S^-1/2 u_k`, outgoing ones `l_k^1/2 v_k`. Each takes `l_k^2` off `E|V_p|^2`. One
    amplitude of all of them is found by a line search on the loss.

    What differs:

    * The path is linearised as in `tfgrow/strategies/linear_units.py`, and h is what arrives at the
      consumer, so that pooling counts. The taps of a consumer's kernel (and the positions behind a
      Flatten) are taken for uncorrelated: S is their mean (in the authors' library the taps' sum).
      That is exact for dense consumers and for 1x1 convolutions.
    * A unit and its mirror image `(-a, -b)` are the same there, but not with ReLU: the one is taken
      whose first-order change of the loss, with its real activation, is the lower.
    * Which layers grow: the paper goes through them one by one; here those grow whose next units
      take most off the bottleneck, `l_k^2`, per parameter, and all at once.
    * Behind a BatchNormalization, which takes the size of incoming weights away, they have the size
      of a usual unit's, and the outgoing weights make up for what it divides by.
    * The existing weights are not moved by dW along with the new ones: training does that. (The
      authors' library does it by default, by one amplitude, but not to reproduce the paper.) Units
      that would raise the loss without it, to first order, are passed over.

    Where no amplitude lowers the loss, nothing is added.

    Args:
      objective: name of the metric that ranks the trials.
      damping: added to the eigenvalues of S before the root is taken, relative to their mean.
      **kwargs: see `tfgrow.strategies.Strategy`; `batches` are those that all this is measured on.

    Example:

    >>> import keras, numpy as np, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu", name="a"), keras.layers.Dense(2)]))
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(size=(64, 4))
    >>> data = x, x[:, :2] * x[:, 2:]
    >>> plan = tfgrow.strategies.Tiny(growth_per_step=2, seed=0).propose_plan(model, data)
    >>> plan.widths
    {'a': (3, 5)}
    >>> tfgrow.measure_change(model, plan.candidates, data) < 0
    True
    """

    biases = True

    def __init__(self, objective="val_loss", *, damping: float = 1e-3, **kwargs) -> None:
        super().__init__(objective, **kwargs)
        if not (isinstance(damping, (int, float)) and 0 <= damping < np.inf):
            raise ValueError(f"damping must be a finite number >= 0. Found: {damping!r}")
        self.damping = damping

    def check(self, model: keras.Model, data: Any) -> None:
        """Also that the model has a copy to try step lengths on."""
        check_ties(model)
        super().check(model, data)

    def too_large(self, units: LinearUnits) -> str | None:
        for node in (node for leaf in units.site.leaves for node in leaf.consumers):
            size = _inputs(node)
            if size > MOST_WEIGHTS:
                return f"'{node.name}', which reads '{units.site.name}', has {size} inputs"
        return super().too_large(units)

    def directions(self, room: Room, units: Sequence[LinearUnits]) -> list[Directions]:
        fits = _fits(room, units)
        return [
            self._best(one, moments, fits)
            for one, moments in zip(units, _moments(room, units, fits), strict=True)
        ]

    def _best(self, units: LinearUnits, moments: _Moments, fits: Mapping[int, _Fit]) -> Directions:
        root = inverse_root(moments.second, self.damping)
        left, values, right = np.linalg.svd(root @ moments.wanted, full_matrices=False)
        wanted = sum(fits[index].wanted for index in _consumers(units.site))
        size = np.sqrt(values)[:, None]
        incoming, outgoing = size * (root @ left).T, size * right
        falls = np.sum(incoming @ moments.alone * outgoing, axis=1) > 0
        kept = falls & (values > NEGLIGIBLE * math.sqrt(wanted)) & (values > 0)
        return Directions(values[kept] ** 2, incoming[kept], outgoing[kept])

    def finished(
        self, room: Room, units: Sequence[LinearUnits], found: Sequence[Directions]
    ) -> list[Candidate]:
        if not units:
            return []
        sizes = [_of_usual_size(*pair) for pair in zip(units, found, strict=True)]
        chosen = _turned(room, units, as_candidates(units, sizes))
        amplitude = line_search(room, chosen)
        if amplitude is None:
            self._notes = ("no amplitude of the new units lowers the loss", *self._notes)
            return []
        return [scaled(candidate, amplitude) for candidate in chosen]


@dataclasses.dataclass(frozen=True, eq=False)
class _Fit:
    """What a consumer's weights can do of the loss gradient at its response.

    Attributes:
      weights: the layer's weights that do it, as its `linear` takes them.
      wanted: mean over the samples of the squared gradient, before that is taken off.
    """

    weights: tuple
    wanted: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Moments:
    """Of a site: S `[A, A]` and N `[A, B]`; and N of V itself, of which nothing is taken off."""

    second: np.ndarray
    wanted: np.ndarray
    alone: np.ndarray


def inverse_root(matrix: np.ndarray, damping: float) -> np.ndarray:
    """`(matrix + damping mean)^-1/2`, with zero for the directions that it has nothing of."""
    values, vectors = np.linalg.eigh(matrix)
    known = values > RANK * values[-1]
    shifted = np.where(known, values + damping * np.mean(values), 1.0)
    return (vectors * np.where(known, shifted**-0.5, 0.0)) @ vectors.T


def _consumers(site: Site) -> list[int]:
    """Indices of the nodes that read a site."""
    return [node.index for leaf in site.leaves for node in leaf.consumers]


def _inputs(node: Node) -> int:
    """Weights of one output of a consumer, its bias left out."""
    layer = node.operation
    return int(np.prod(getattr(layer, layer.kernel_name).shape)) // layer.growth_units


def _fits(room: Room, units: Sequence[LinearUnits]) -> dict[int, _Fit]:
    """By index of the consumers of some sites: what their own weights can do."""
    nodes = {n.index: n for one in units for leaf in one.site.leaves for n in leaf.consumers}
    sums: dict[int, list] = {index: [0.0, 0.0, 0.0] for index in nodes}
    samples = 0
    for captured, count in captures(room, units, room.data.learn):
        samples += count
        for index, node in nodes.items():
            for patches, gradient in _patches(captured, node):
                new = (
                    tf.matmul(patches, patches, transpose_a=True).numpy(),
                    tf.matmul(patches, gradient, transpose_a=True).numpy(),
                    float(tf.reduce_sum(gradient**2)),
                )
                sums[index] = [old + more for old, more in zip(sums[index], new, strict=True)]
    fits = {}
    for index, (inner, outer, square) in sums.items():
        solved = np.linalg.pinv(inner, rcond=RANK, hermitian=True) @ outer
        fits[index] = _Fit(_as_weights(nodes[index], solved), square / samples)
    return fits


def _patches(captured: Capture, node: Node) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
    """What a consumer sees `[rows, T*c]`, with a 1 for its bias; the gradient `[rows, O]`."""
    layer, read = node.operation, captured.values[input_tap(node.index)]
    gradient = captured.cotangents[linear_tap(node.index)]
    per_sample = _inputs(node) * int(np.prod(gradient.shape[2:-1]))
    for part in slices(captured, len(read), per_sample):
        seen = layer.unfold(part.values[input_tap(node.index)])  # [N, c, P, T]
        seen = tf.reshape(tf.transpose(seen, (0, 2, 3, 1)), (-1, seen.shape[1] * seen.shape[3]))
        if layer.absorbs_constant:
            seen = tf.concat([seen, tf.ones_like(seen[:, :1])], axis=1)
        mine = part.cotangents[linear_tap(node.index)][0]
        # float32 would take what the layer can all but do for what it cannot
        yield tf.cast(seen, tf.float64), tf.cast(tf.reshape(mine, (-1, mine.shape[-1])), tf.float64)


def _as_weights(node: Node, solved: np.ndarray) -> tuple:
    """Rows as `_patches` orders them, as the kernel, and the bias if there is one."""
    layer = node.operation
    taps = int(np.prod(layer.kernel_spatial, dtype=np.int64))
    rows = solved[:-1] if layer.absorbs_constant else solved
    rows = rows.reshape(taps, -1, rows.shape[-1]).astype("float32")
    kernel = layer.kernel_from_rows(tf.constant(rows))
    if not layer.absorbs_constant:
        return (kernel,)
    return kernel, tf.constant(solved[-1].astype("float32"))


def _moments(room: Room, units: Sequence[LinearUnits], fits: Mapping[int, _Fit]) -> list[_Moments]:
    sums = [
        _Moments(np.zeros((one.fan_in, one.fan_in)), *np.zeros((2, one.fan_in, one.fan_out)))
        for one in units
    ]
    samples = 0
    for captured, count in captures(room, units, room.data.learn):
        samples += count
        beyond = _beyond(captured, units, fits)
        for one, total in zip(units, sums, strict=True):
            for whole, part in zip(one.slices(captured), one.slices(beyond), strict=True):
                values = one.basis(part)
                total.second[...] += _second_moments(one, part, values)
                total.wanted[...] -= one.gradients(part, values)
                total.alone[...] -= one.gradients(whole, values)
    return [_Moments(m.second / samples, m.wanted / samples, m.alone / samples) for m in sums]


def _beyond(captured: Capture, units: Sequence[LinearUnits], fits: Mapping[int, _Fit]) -> Capture:
    """The capture with gradients at the consumers that their own weights can do nothing about."""
    cotangents = dict(captured.cotangents)
    layers = {n.index: n.operation for u in units for leaf in u.site.leaves for n in leaf.consumers}
    for index, layer in layers.items():
        fitted = layer.linear(captured.values[input_tap(index)], *fits[index].weights)
        tap = linear_tap(index)
        cotangents[tap] = captured.cotangents[tap] - fitted[None]
    return Capture(captured.values, cotangents)


def _second_moments(units: LinearUnits, captured: Capture, values: Mapping[int, Any]) -> np.ndarray:
    """S, summed over samples and the consumer's positions; the mean over consumers and taps."""
    total, taps = np.zeros((units.fan_in, units.fan_in)), consumer_taps(units.site)
    gradients = iter(captured.cotangents[tap][0] for tap in taps)
    for leaf in units.site.leaves:
        rows = units.rows(leaf, values[leaf.tensor])
        product = tf.matmul(rows, rows, transpose_a=True).numpy().astype("float64")
        for _ in leaf.consumers:
            gradient = next(gradients)
            seen = int(np.prod(gradient.shape[:-1])) / len(rows)
            total += seen * product / len(taps)
    return total


def _turned(
    room: Room, units: Sequence[LinearUnits], candidates: Sequence[Candidate]
) -> list[Candidate]:
    """Units or their mirror images: whichever lowers the loss more with its real activation."""
    mirrored = [
        candidate.replace(theta={name: -value for name, value in candidate.theta.items()})
        for candidate in candidates
    ]
    both = [_sized(room, some) for some in (candidates, mirrored)]
    changes = [first_order(room, units, some) for some in both]
    return [
        image if there < here else unit
        for unit, image, here, there in zip(*both, *changes, strict=True)
    ]


def first_order(
    room: Room, units: Sequence[LinearUnits], candidates: Sequence[Candidate]
) -> np.ndarray:
    """Change of the loss `[n]` by each of some candidates, to first order in its outgoing weights.

    Args:
      room: see `Room`.
      units: those of the candidates' sites.
      candidates: with their statistics.
    """
    by_site = {one.site.name: one for one in units}
    groups, positions = group_candidates(room.model, candidates)
    changes = np.zeros(len(candidates))
    for captured, _ in captures(room, units, room.data.learn):
        for group, where in zip(groups, positions, strict=True):
            (effect,) = perturb_all(captured, [group], [group.theta], fresh=False)
            gradients = by_site[group.site.name].gradients(captured, effect.values)
            outgoing = [group.theta[f"phi/{n}"] for n in range(len(group.site.consumers))]
            flat = np.concatenate([v.reshape(len(where), -1) for v in outgoing], axis=1)
            changes[where] += np.sum(gradients * flat, axis=1)
    return changes


def _of_usual_size(units: LinearUnits, found: Directions) -> Directions:
    """The same to first order; where the incoming weights are normalised, of a usual size."""
    if not normalised(units.site):
        return found
    norms = np.linalg.norm(found.incoming, axis=1, keepdims=True)
    factor = incoming_norm(units.site) / np.maximum(norms, 1e-30)
    return Directions(found.gains, factor * found.incoming, found.outgoing / factor)


def _sized(room: Room, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with their statistics, whose outgoing weights make up for what divides by them."""
    sized = []
    for candidate in measured(room.model, candidates, room.data.learn):
        theta, index, divisors = dict(candidate.theta), 0, _divisors(candidate)
        for leaf in candidate.site.leaves:
            for _ in leaf.consumers:
                theta[f"phi/{index}"] = theta[f"phi/{index}"] * np.float32(divisors[leaf.tensor])
                index += 1
        sized.append(candidate.replace(theta=theta))
    return sized


def _divisors(candidate: Candidate) -> dict[int, float]:
    """By tensor of a site's path: what the statistics of a new unit divide its values by."""
    divisors: dict[int, Any] = {
        response_id(number): 1.0 for number in range(len(candidate.site.producers))
    }
    for number, step in enumerate(Path(candidate.site, 1).steps):
        divisor = divisors[step.source]
        moments = state_moments(candidate.state, "new", number)
        if needs_moments(step) and moments is not None:
            variance = np.mean(moments.variance) + getattr(step.layer, "epsilon", 0.0)
            divisor *= float(np.sqrt(variance))
        divisors[step.target] = divisor
    return divisors


def scaled(candidate: Candidate, amplitude: float) -> Candidate:
    """The candidate with what it adds times an amplitude, shared by both of its ends.

    Where the size of incoming weights is normalised away, the outgoing ones bear all of it.
    """
    alone = normalised(candidate.site)
    factors = {True: amplitude if alone else math.sqrt(amplitude)}
    factors[False] = 1.0 if alone else math.sqrt(amplitude)
    theta = {
        name: value * np.float32(factors[name.startswith("phi/")])
        for name, value in candidate.theta.items()
    }
    return candidate.replace(theta=theta)


def line_search(room: Room, candidates: Sequence[Candidate]) -> float | None:
    """The amplitude at which candidates lower the loss most, up to a factor of two; or None.

    They are really applied, all at once, to a copy of the model.
    """
    change = _Changes(room, candidates)
    amplitude, best = 1.0, change(1.0)
    for _ in range(DOUBLINGS):
        found = change(2 * amplitude)
        if not found < best:
            break
        amplitude, best = 2 * amplitude, found
    if amplitude == 1.0:
        for _ in range(DOUBLINGS):
            found = change(amplitude / 2)
            if best < 0 and not found < best:
                break
            amplitude, best = amplitude / 2, found
    return amplitude if best < 0 else None


class _Changes:
    """What candidates at an amplitude change the loss by, on the data that none is judged by."""

    def __init__(self, room: Room, candidates: Sequence[Candidate]):
        self._copy: keras.Model = copy_model(room.model, compiled=False)
        sites = {site.name: site for site in find_sites(self._copy)}
        self._candidates = [c.replace(site=sites[c.site.name]) for c in candidates]
        self._loss = compiled_loss(room.model)
        self._batches: list[Batch] = [*room.data.learn, *room.data.score]
        self._before = self._measure()

    def __call__(self, amplitude: float) -> float:
        candidates = [scaled(candidate, amplitude) for candidate in self._candidates]
        with growth_transaction(self._copy) as trial:
            apply_edits(self._copy, edits_of(candidates))
            after = self._measure()
            trial.rollback()
        return after - self._before if math.isfinite(after) else math.inf

    def _measure(self) -> float:
        return real_loss(self._copy, self._batches, *self._loss)
