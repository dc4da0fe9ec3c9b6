"""Branches that start at zero: what new layers make of one tensor is added to another.

With features h of the branch and a last, linear layer `last`, the tensor changes by D = h last. It
is linear in `last`, and like the outgoing weights of added units `last` has a closed form, joint
over all features: with G the mean gradient and Q the Gauss-Newton matrix, -(Q + damping)^-1 G.

Layouts: theta's `last` is `[n, A, C]`, A features and C channels of the target; a group is one
candidate, for places differ in shape.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrow.capture.execute import tensor_tap
from tfgrow.curvature.normal import (
    WIDE,
    cross_damping,
    dense_sums,
    kronecker_sums,
    quadratic,
    solve_factored,
    solve_sums,
    zero_sums,
)
from tfgrow.graph.nodes import Graph, Node
from tfgrow.morphisms.base import OneByOne, Perturbed

DENSE_LIMIT = 1024
"""Above so many weights in the last layer, Q is Kronecker-factored."""


@dataclasses.dataclass(frozen=True, eq=False)
class Branching:
    """Where a branch begins and ends.

    Attributes:
      source, target: the nodes between whose outputs it lies; they may be the same.
      read, changed: ids of those outputs.
      shape: static shape of the changed tensor.
      channels: of the tensor that is read.
    """

    source: Node
    target: Node
    read: int
    changed: int
    shape: tuple
    channels: int


def once_per_site(method: Callable) -> Callable:
    """Keeps what a morphism's method says of a site: learning and scoring ask again and again."""
    known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    @functools.wraps(method)
    def ask(morphism, site):
        said = known.setdefault(site, {})
        if morphism not in said:
            said[morphism] = method(morphism, site)
        return said[morphism]

    return ask


class Branch(OneByOne):
    """A branch whose last layer starts at zero. See the module's docstring."""

    solved = ("last",)
    reads_producer = False
    edits_unit = False
    units = 0

    def branchings(self, site) -> list[Branching]:
        """Where a site's candidates lie; candidate number i is the i-th of them."""
        raise NotImplementedError

    def features(self, capture, branching: Branching, theta) -> Any:
        """What the last layer reads, `[N, ..., A]`; theta without the candidates' axis."""
        raise NotImplementedError

    def reason(self, site):
        model = site.model()
        if isinstance(model, keras.Sequential):
            return (
                f"model '{model.name}' is a Sequential, in which no branch can be expressed; "
                "rebuild it with the functional API"
            )
        if not self.branchings(site):
            return f"there is no place for a new branch at '{site.name}'"
        return None

    def group_key(self, candidate):
        return candidate.unit

    def taps(self, site):
        return list(dict.fromkeys(tensor_tap(b.changed) for b in self.branchings(site)))

    def perturb(self, capture, group, theta, responses, fresh):
        del responses, fresh
        mine = {name: value[0] for name, value in theta.items() if name != "last"}
        place = self._place(group)
        return Perturbed({place.changed: self.features(capture, place, mine)}, {})

    def covectors(self, capture, group, theta, perturbed):
        del perturbed
        changed = self._place(group).changed
        pulled = tf.tensordot(
            capture.cotangents[tensor_tap(changed)], tf.transpose(theta["last"][0]), 1
        )
        return {changed: tf.stop_gradient(pulled)}

    def tangents(self, group, theta, perturbed):
        changed = self._place(group).changed
        return {tensor_tap(changed): tf.tensordot(perturbed.values[changed], theta["last"][0], 1)}

    def equations(self, capture, group, perturbed):
        changed = self._place(group).changed
        features = perturbed.values[changed]
        stacked = capture.cotangents[tensor_tap(changed)]
        size, (passes, *_, channels) = features.shape[-1], stacked.shape
        seen = tf.reshape(features, (tf.shape(features)[0], 1, -1, size))
        flat = tf.reshape(stacked, (passes, -1, tf.shape(seen)[2], channels))
        sums = (dense_sums if _dense(group) else kronecker_sums)([seen], [flat])
        return {**sums, "energy": tf.zeros((1,)), "usual": tf.zeros(())}

    def no_equations(self, group):
        return zero_sums(1, [group.theta["last"].shape[1:]], _dense(group))

    def solve(self, group, sums, damping):
        solution = _solver(group)(sums, damping)
        return {"last": tf.reshape(solution, group.theta["last"].shape)}

    def choose_damping(self, group, first, second):
        return cross_damping(first, second, _solver(group), quadratic)

    def scaled(self, candidate, alpha):
        last = alpha * candidate.theta["last"]
        return candidate.replace(theta={**candidate.theta, "last": last})

    def _place(self, group) -> Branching:
        return self.branchings(group.site)[int(group.units[0])]


def _dense(group) -> bool:
    return int(np.prod(group.theta["last"].shape)) <= DENSE_LIMIT


def _solver(group) -> Callable:
    wide = max(group.theta["last"].shape[1:]) > WIDE
    return solve_factored if wide and not _dense(group) else solve_sums


def flops_at(place: Branching, weights: int) -> int:
    """FLOPs per sample of so many weights that are used at every position of a place."""
    positions = [size for size in place.shape[1:-1] if size is not None]
    return 2 * weights * int(np.prod(positions, dtype=np.int64))


def ends_of(site) -> list[tuple[Node, int]]:
    """The nodes at whose outputs a site's path ends, with these outputs; each end at one site only.

    They are channels, positions apart, of floating point numbers.
    """
    graph, found = site.graph, []
    for leaf in site.leaves:
        node = maker_of(graph, leaf.tensor)
        flattened = len(graph.tensors[leaf.tensor].shape) < len(
            graph.tensors[site.producers[0].outputs[0]].shape
        )
        if node is not None and leaf.first and not (flattened and leaf.channels.blocks > 1):
            found.append((node, leaf.tensor))
    return found


def maker_of(graph: Graph, tensor: int) -> Node | None:
    """The node that makes a tensor, if it makes nothing else and its layer is called once."""
    node = graph.maker(tensor)
    if node is None or len(node.outputs) > 1 or len(graph.calls(node.operation)) > 1:
        return None
    return node


def is_convolved(site) -> bool:
    """Whether a site's channels lie on positions that convolutions read."""
    return bool(site.producers[0].operation.kernel_spatial)
