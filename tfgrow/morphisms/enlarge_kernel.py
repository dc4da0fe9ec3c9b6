"""Enlarge a kernel: 1 -> 3, 3 -> 5..., with a learned ring around the weights it has.

At a ring of zeros the function is unchanged. The ring changes the convolution's response linearly,
by ring * x: with G the mean gradient there and Q the Gauss-Newton matrix with respect to the ring,
-(Q + damping)^-1 G is its direction in closed form. How far to go along it is learned per output by
gradient, with the perturbation D = path(u + ring * x) - path(u) carried exactly through the site's
path and linearised at the consumers: the activation in between makes long steps turn out otherwise.
Where the convolution's channels can't be followed, D is taken at its response.

Source: the kernel morphism of Wei et al. 2016 (arXiv 1603.01670), with the ring learned on the
estimate of Lawton et al., arXiv 2411.05855.

Layouts: theta's `ring` is `[n, R, in, O]`, R the taps of the new kernel that the old one leaves
free, its `length` `[n, O]` the logarithm of a factor; a group is one candidate, for convolutions
differ in shape.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgrow.capture.capture import (
    leaf_taps,
    outside_of,
    producer_inputs,
    producer_responses,
    taps_of_leaf,
)
from tfgrow.capture.execute import linear_tap, tensor_tap
from tfgrow.capture.path import Path, take
from tfgrow.curvature.normal import (
    LEARNING_DAMPING,
    dense_sums,
    solve_factored,
    solve_sums,
    zero_sums,
)
from tfgrow.graph.channels import called_too_often
from tfgrow.layers.growable import Enlargement
from tfgrow.morphisms.base import Candidate, Morphism, Perturbed, cotangents_at
from tfgrow.types import Cost, Demand, KernelEdit

DENSE_LIMIT = 1024
"""Above so many weights in a ring, Q is Kronecker-factored."""

START = 0.5
"""How far along the ring of the closed form a candidate starts."""

LENGTH_SCALE = 3.0
"""Natural size of the logarithm of a length: a learning step of 0.1 changes it by a third."""

ROWS = 4096
"""So many positions of a batch are enough to tell how inputs are correlated."""

MOST_INPUTS = 2304
"""Largest number of weights of one output in a ring: beyond, its correlations fill the memory."""


class EnlargeKernel(Morphism):
    """Enlarges one convolution's kernel by two in every direction. See the module's docstring."""

    name = "enlarge_kernel"
    solved = ("ring",)
    perturbs_by_solved = True
    reads_producer = False
    edits_unit = False
    units = 0

    def reason(self, site):
        reasons = [_reason(site, number) for number in range(len(site.producers))]
        if not reasons:
            return site.blocked
        return None if None in reasons else reasons[0]

    def candidates(self, site, *, new_units, seed):
        del new_units, seed
        found = []
        for number in range(len(site.producers)):
            if _reason(site, number) is None:
                _, channels, outputs = _shape(site, number)
                ring = np.zeros((len(_free(site, number)), channels, outputs), "float32")
                length = np.full(outputs, np.log(START), "float32")
                theta = {"ring": ring, "length": length}
                found.append(Candidate(site, self.name, number, theta, {}, Cost()))
        return found

    def group_key(self, candidate):
        return candidate.unit

    def demand(self, candidate):
        layer = candidate.site.producers[candidate.unit].operation
        size = _enlargement(candidate.site, candidate.unit).kernel_size
        return Demand(kernels={layer.name: size})

    def taps(self, site):
        at_responses = [linear_tap(node.index) for node in site.producers]
        return [*at_responses, *leaf_taps(site)]

    def scale(self, site, units):
        del site
        return {"length": np.full(len(units), LENGTH_SCALE, "float32")}

    def perturb(self, capture, group, theta, responses, fresh):
        del responses, fresh
        site, number = group.site, _number(group)
        node = site.producers[number]
        read = producer_inputs(capture, site)[number]
        ring = theta["ring"][0] * tf.exp(theta["length"][0])
        change = node.operation.linear_enlarged(read, _kernel(site, number, ring))
        if site.blocked is not None:
            return Perturbed({node.index: change}, {})
        now = producer_responses(capture, site)
        now[number] = now[number] + change
        path, every = _whole_path(site), range(site.units)
        arriving = path.run(now, path.live_variables(every), outside_of(capture))
        return Perturbed(
            {
                leaf.tensor: arriving[leaf.tensor]
                - take(capture.values[tensor_tap(leaf.tensor)], _order(path, leaf))
                for leaf in site.leaves
            },
            {},
        )

    def covectors(self, capture, group, theta, perturbed):
        del theta, perturbed
        site = group.site
        if site.blocked is not None:
            index = site.producers[_number(group)].index
            return {index: capture.cotangents[linear_tap(index)]}
        path = _whole_path(site)
        return {
            leaf.tensor: take(cotangents_at(capture, leaf), _order(path, leaf))
            for leaf in site.leaves
        }

    def scalars(self, group, covectors, perturbed):
        del group
        products = [covectors[place] * value for place, value in perturbed.values.items()]
        return tf.add_n([tf.reduce_sum(p, list(range(2, len(p.shape)))) for p in products])[
            ..., None
        ]

    def slopes(self, group, weights, covectors):
        del group
        return {
            place: tf.reduce_sum(
                tf.reshape(weights, (weights.shape[0], -1, *[1] * (len(c.shape) - 2))) * c, axis=0
            )
            for place, c in covectors.items()
        }

    def tangents(self, group, theta, perturbed):
        del theta
        site = group.site
        if site.blocked is not None:
            return {linear_tap(place): value for place, value in perturbed.values.items()}
        path, tangents = _whole_path(site), {}
        for leaf in site.leaves:
            back = tf.one_hot(_order(path, leaf), leaf.channels.size, dtype=tf.float32)
            delta = tf.tensordot(perturbed.values[leaf.tensor], back, 1)
            tangents |= dict.fromkeys(taps_of_leaf(leaf), delta)
        return tangents

    def equations(self, capture, group, perturbed):
        del perturbed
        number = _number(group)
        node = group.site.producers[number]
        read = producer_inputs(capture, group.site)[number]
        stacked = capture.cotangents[linear_tap(node.index)]
        nothing = {"energy": tf.zeros((1,)), "usual": tf.zeros(())}
        if _dense(group):
            seen, passes = _ring_patches(group, read), stacked.shape[0]
            flat = tf.reshape(stacked, (passes, -1, tf.shape(seen)[2], stacked.shape[-1]))
            return {**dense_sums([seen], [flat]), **nothing}
        return {**_factored_sums(group, node.operation, read, stacked), **nothing}

    def no_equations(self, group):
        _, taps, channels, outputs = group.theta["ring"].shape
        return zero_sums(1, [(taps * channels, outputs)], _dense(group))

    def solve(self, group, sums, damping):
        phi = solve_sums(sums, damping) if _dense(group) else solve_factored(sums, damping)
        return {"ring": tf.reshape(phi, group.theta["ring"].shape)}

    def choose_damping(self, group, first, second):
        del group, first, second
        return LEARNING_DAMPING  # that of the rings whose lengths were learned

    def edit(self, candidate):
        number = candidate.unit
        larger = _enlargement(candidate.site, number)
        ring = candidate.theta["ring"] * np.exp(candidate.theta["length"])
        kernel = np.asarray(_kernel(candidate.site, number, ring))
        return KernelEdit(candidate.site, number, larger.attributes, larger.offset, kernel)

    def scaled(self, candidate, alpha):
        return candidate.replace(theta={**candidate.theta, "ring": alpha * candidate.theta["ring"]})


def _reason(site, number: int) -> str | None:
    node = site.producers[number]
    if not node.mixing:
        return site.blocked
    often = called_too_often(site.graph, node.operation)
    if often:
        return often
    if not node.operation.trainable:
        return f"layer '{node.name}' is frozen (trainable=False)"
    shape = site.graph.tensors[node.inputs[0]].shape
    found = node.operation.enlargement(tuple(shape))
    if isinstance(found, str):
        return found
    if len(_free(site, number)) * _shape(site, number)[1] > MOST_INPUTS:
        return f"layer '{node.name}' reads too many channels for a larger kernel to be learned"
    return None


def _enlargement(site, number: int) -> Enlargement:
    node = site.producers[number]
    return node.operation.enlargement(tuple(site.graph.tensors[node.inputs[0]].shape))


def _shape(site, number: int) -> tuple[tuple[int, ...], int, int]:
    """`(kernel_size, in, out)` of a producer as it is."""
    *size, channels, outputs = site.producers[number].operation.kernel.shape
    return tuple(size), channels, outputs


def _free(site, number: int) -> np.ndarray:
    """The taps `[R]` of the larger kernel that the old one does not take."""
    larger = _enlargement(site, number)
    taken = np.zeros(larger.kernel_size, bool)
    inner = zip(larger.offset, _shape(site, number)[0], strict=True)
    taken[tuple(slice(start, start + size) for start, size in inner)] = True
    return np.flatnonzero(~taken)


def _kernel(site, number: int, ring):
    """A ring `[R, in, O]` as a kernel of the larger size, zero where the old one lies."""
    larger, free = _enlargement(site, number), _free(site, number)
    taps = int(np.prod(larger.kernel_size))
    flat = tf.scatter_nd(free[:, None], tf.convert_to_tensor(ring), (taps, *ring.shape[1:]))
    return tf.reshape(flat, (*larger.kernel_size, *ring.shape[1:]))


def _number(group) -> int:
    return int(group.units[0])


def _whole_path(site) -> Path:
    return Path(site, site.units)


def _order(path: Path, leaf) -> np.ndarray:
    """Where the channels of a path of all units lie at a leaf."""
    return path.positions(leaf.tensor, leaf.channels, range(path.count))


def _ring_patches(group, read):
    """What each output position sees through the ring: `[N, 1, P, R*in]`."""
    number = _number(group)
    layer = group.site.producers[number].operation
    size = _enlargement(group.site, number).kernel_size
    seen = tf.gather(layer.unfold_enlarged(read, size), _free(group.site, number), axis=3)
    seen = tf.transpose(seen, (0, 2, 3, 1))  # [N, P, R, in]
    positions = seen.shape[1] or tf.shape(seen)[1]
    return tf.reshape(seen, (-1, 1, positions, seen.shape[2] * seen.shape[3]))


def _factored_sums(group, layer, read, stacked) -> dict:
    """As `kronecker_sums`; the inputs' correlations are those of some of the samples."""
    _, taps, channels, outputs = group.theta["ring"].shape
    start = tf.zeros((taps, channels, outputs))
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(start)
        response = layer.linear_enlarged(read, _kernel(group.site, _number(group), start))
    slope = tape.gradient(response, start, output_gradients=stacked[0])
    columns = tf.reshape(stacked[1:], (-1, outputs))
    samples = tf.shape(read)[0]
    positions = tf.size(stacked[0]) // (samples * outputs)
    some = tf.clip_by_value(ROWS // positions, 1, samples)
    rows = tf.reshape(_ring_patches(group, read[:some]), (-1, taps * channels))
    share = tf.cast(samples, tf.float32) / tf.cast(some, tf.float32)
    return {
        "g": tf.reshape(slope, (1, -1)),
        "a/0": share * tf.matmul(rows, rows, transpose_a=True)[None],
        "s/0": tf.matmul(columns, columns, transpose_a=True),
        "rows/0": tf.cast(samples * positions, tf.float32),
    }


def _dense(group) -> bool:
    return int(np.prod(group.theta["ring"].shape)) <= DENSE_LIMIT
