"""The ring around a kernel: its shape, and the closed form of what is best there.

The taps of a mixing kernel see all channels, and the ring's Q is the whole one if it is small, else
Kronecker-factored. Those of a depthwise kernel see one; then Q is the whole one or that of every
output by itself.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfgrow.curvature.normal import (
    dense_sums,
    solve_factored,
    solve_sums,
    zero_sums,
)
from tfgrow.layers.growable import Enlargement
from tfgrow.morphisms.factored import factored_sums

DENSE_LIMIT = 1024
"""Above so many weights in a ring, Q is factored or taken output by output."""


def enlargement(site, number: int) -> Enlargement:
    """The larger kernel of a site's producer that can have one."""
    node = site.producers[number]
    return node.operation.enlargement(tuple(site.graph.tensors[node.inputs[0]].shape))


def shapes(site, number: int) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """Of a producer's ring, `(taps, *channels)`, and of what is told of every output of it."""
    node = site.producers[number]
    channels = tuple(node.operation.kernel.shape[-2:])
    return (len(free_taps(site, number)), *channels), channels[1:] if node.mixing else channels


def free_taps(site, number: int) -> np.ndarray:
    """The taps `[R]` of the larger kernel that the old one does not take."""
    larger = enlargement(site, number)
    taken = np.zeros(larger.kernel_size, bool)
    old = site.producers[number].operation.kernel.shape[:-2]
    inner = zip(larger.offset, old, strict=True)
    taken[tuple(slice(start, start + size) for start, size in inner)] = True
    return np.flatnonzero(~taken)


def kernel_with(site, number: int, ring):
    """A ring `[R, *channels]` as a kernel of the larger size, zero where the old one lies."""
    larger, free = enlargement(site, number), free_taps(site, number)
    taps = int(np.prod(larger.kernel_size))
    flat = tf.scatter_nd(free[:, None], tf.convert_to_tensor(ring), (taps, *ring.shape[1:]))
    return tf.reshape(flat, (*larger.kernel_size, *ring.shape[1:]))


def number_of(group) -> int:
    """Which of its site's producers the group's one candidate enlarges."""
    return int(group.units[0])


def equations(group, read, stacked) -> dict:
    """One batch's sums of the quadratic in the ring.

    Args:
      group: of one candidate.
      read: what the convolution reads, `[N, ..., in]`.
      stacked: cotangents of its response, `[1 + K, N, ..., O]`.
    """
    if not _mixing(group):
        return _channel_sums(_channel_gradients(group, read, stacked), _dense(group))
    if _dense(group):
        seen, passes = _ring_patches(group, read), stacked.shape[0]
        flat = tf.reshape(stacked, (passes, -1, tf.shape(seen)[2], stacked.shape[-1]))
        return {**dense_sums([seen], [flat]), "energy": tf.zeros((1,)), "usual": tf.zeros(())}
    return _factored_sums(group, read, stacked)


def no_equations(group) -> dict:
    """`equations` of no data."""
    _, taps, channels, outputs = group.theta["ring"].shape
    if _mixing(group) or _dense(group):
        return zero_sums(1, [(taps * channels, outputs)], _dense(group))
    return zero_sums(channels * outputs, [(taps, 1)], dense=True)


def solve(group, sums, damping):
    """The ring `[1, R, *channels]` in closed form."""
    if _mixing(group) and not _dense(group):
        found = solve_factored(sums, damping)
    else:
        found = solve_sums(sums, damping)
    if not _mixing(group) and not _dense(group):
        found = tf.transpose(found)  # [outputs, R]
    return tf.reshape(found, group.theta["ring"].shape)


def _ring_patches(group, read):
    """What each output position sees through the ring: `[N, 1, P, R*in]`."""
    number = number_of(group)
    size = enlargement(group.site, number).kernel_size
    seen = _layer(group).unfold_enlarged(read, size)
    seen = tf.gather(seen, free_taps(group.site, number), axis=3)
    seen = tf.transpose(seen, (0, 2, 3, 1))  # [N, P, R, in]
    positions = seen.shape[1] or tf.shape(seen)[1]
    return tf.reshape(seen, (-1, 1, positions, seen.shape[2] * seen.shape[3]))


def _factored_sums(group, read, stacked) -> dict:
    number, layer = number_of(group), _layer(group)
    return factored_sums(
        lambda ring: layer.linear_enlarged(read, kernel_with(group.site, number, ring)),
        group.theta["ring"].shape[1:],
        lambda some: _ring_patches(group, some),
        read,
        stacked,
    )


def _channel_gradients(group, read, stacked):
    """Every sample's gradient with respect to a depthwise ring: `[R, 1 + K, N, O]`."""
    number, layer = number_of(group), _layer(group)
    size = enlargement(group.site, number).kernel_size
    passes, outputs = stacked.shape[0], stacked.shape[-1]
    samples, channels = tf.shape(read)[0], read.shape[-1]
    flat = tf.reshape(stacked, (passes, samples, -1, channels, outputs // channels))
    flat = tf.transpose(flat, (1, 3, 2, 0, 4))  # [N, in, P, 1 + K, multiplier]
    flat = tf.reshape(flat, (samples, channels, -1, passes * (outputs // channels)))
    found = []
    for tap in free_taps(group.site, number):  # all at once would take R times the memory
        seen = tf.reshape(layer.inputs_at(read, size, tap), (samples, -1, channels))
        seen = tf.transpose(seen, (0, 2, 1))[:, :, None]
        found.append(tf.reshape(tf.matmul(seen, flat), (samples, channels, passes, -1)))
    each = tf.transpose(tf.stack(found), (0, 3, 1, 2, 4))
    return tf.reshape(each, (len(found), passes, samples, outputs))


def _channel_sums(gradients, dense: bool) -> dict:
    """Sums of one batch with the whole of Q, or with that of every output by itself."""
    taps, passes, _, outputs = gradients.shape
    total = tf.reduce_sum(gradients[:, 0], axis=1)  # [R, O]
    if dense:
        columns = tf.reshape(tf.transpose(gradients, (1, 2, 0, 3)), (passes, -1, taps * outputs))
        columns = tf.reshape(columns[1:], (-1, taps * outputs))
        g, q = tf.reshape(total, (1, -1)), tf.matmul(columns, columns, transpose_a=True)[None]
    else:
        columns = tf.reshape(gradients[:, 1:], (taps, -1, outputs))
        columns = tf.transpose(columns, (2, 1, 0))  # [O, K * N, R]
        g, q = tf.transpose(total), tf.matmul(columns, columns, transpose_a=True)
    return {"g": g, "q": q, "energy": tf.zeros(g.shape[0]), "usual": tf.zeros(())}


def _layer(group):
    return group.site.producers[number_of(group)].operation


def _mixing(group) -> bool:
    return group.site.producers[number_of(group)].mixing


def _dense(group) -> bool:
    return int(np.prod(group.theta["ring"].shape)) <= DENSE_LIMIT
