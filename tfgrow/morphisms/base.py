"""What a morphism is: a structural edit with parameters theta, and how its effect is estimated.

A morphism is one file with one subclass of `Morphism`. Candidates of one morphism at one site are
worked on together, as a `Group`; every array of theta carries the candidates on its *first* axis.

The estimate of a candidate with perturbation D is, per sample, `g.D + 1/2 sum_k (s_k.D)^2`
(arXiv 2411.05855; g the loss gradient and s_k the curvature's columns, where D is linearised).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from tfgrow.capture.capture import Capture, leaf_taps, producer_inputs, taps_of_leaf
from tfgrow.capture.execute import Tap
from tfgrow.capture.path import Path, take
from tfgrow.graph.sites import Leaf, Site, parameter_name
from tfgrow.morphisms.weights import as_layer_weights
from tfgrow.types import Cost, Demand, HeadsEdit, KernelEdit, WidthEdit

Theta = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """One smallest edit of a model, with its parameters.

    Attributes:
      site: where it acts.
      morphism: the kind of edit, by name.
      unit: the unit it acts on, or for new units a number that tells them apart.
      theta: its parameters, one array per name.
      state: what was measured along with theta and is needed to apply it (statistics).
      cost: what it adds to the model when applied alone.
    """

    site: Site
    morphism: str
    unit: int
    theta: Mapping[str, np.ndarray]
    state: Mapping[str, np.ndarray]
    cost: Cost

    def replace(self, **changes) -> Candidate:
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    @property
    def key(self) -> tuple[str, str, int]:
        """Candidates with equal keys are the same edit with other parameters."""
        return (self.site.name, self.morphism, self.unit)

    def __repr__(self) -> str:
        return f"<Candidate {self.morphism} {self.site.name}[{self.unit}], {self.cost.params:+d}>"


class Group:
    """Candidates of one morphism at one site, stacked.

    Attributes:
      morphism: the `Morphism`.
      site: their site.
      units: int array `[n]`.
      path: the site's path for the candidates' units.
      scales: natural size of the entries of each learned parameter, `[n]` per name.
      static: integer state (which shapes the computation), stacked.
      theta: float parameters and state, stacked: `[n, ...]` per name.
    """

    def __init__(self, morphism: Morphism, candidates: Sequence[Candidate]):
        self.morphism = morphism
        self.site = candidates[0].site
        self.units = np.asarray([candidate.unit for candidate in candidates], dtype=np.int64)
        self.path = Path(self.site, len(self.units) * morphism.together)
        self.scales = morphism.scale(self.site, self.units)
        stacked = _stack([{**c.state, **c.theta} for c in candidates])
        self.static = {k: v for k, v in stacked.items() if v.dtype.kind == "i"}
        self.theta = {k: v for k, v in stacked.items() if v.dtype.kind == "f"}

    @property
    def learned(self) -> tuple[str, ...]:
        """The names of theta that are improved by gradient."""
        return tuple(self.scales)


def perturb_all(
    capture: Capture, groups: Sequence[Group], thetas: Sequence[Theta], fresh: bool
) -> list[Perturbed]:
    """What all groups do on a batch; see `Morphism.perturb`."""
    return [
        group.morphism.perturb(capture, group, theta, responses, fresh)
        for group, theta, responses in zip(
            groups, thetas, _responses(capture, groups, thetas), strict=True
        )
    ]


def _responses(capture: Capture, groups: Sequence[Group], thetas: Sequence[Theta]) -> list:
    """Per group, its producers' responses to theta; one call per producer serves all its groups.

    Most of a call on few units is spent on taking the input apart.
    """
    by_site: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        if group.morphism.reads_producer:
            by_site.setdefault(group.site.name, []).append(number)
    responses: list = [[] for _ in groups]
    for members in by_site.values():
        site = groups[members[0]].site
        sizes = [groups[number].path.count for number in members]
        inputs = producer_inputs(capture, site)
        for producer, (node, read) in enumerate(zip(site.producers, inputs, strict=True)):
            weights = {
                name: tf.concat(
                    [
                        single_units(groups[number].morphism, thetas[number][name])
                        for number in members
                    ],
                    axis=0,
                )
                for name in (
                    parameter_name(own, producer) for own in node.operation.growable_variables()
                )
            }
            layer = node.operation
            together = layer.linear(read, **as_layer_weights(layer, weights, producer))
            for number, part in zip(members, _parts(together, sizes), strict=True):
                responses[number].append(part)
    return responses


def single_units(morphism: Morphism, values):
    """Stacked parameters by unit: `[n, together, ...] -> [n * together, ...]`."""
    if morphism.together == 1:
        return values
    return tf.reshape(values, (-1, *values.shape[2:]))


def _parts(values, sizes: Sequence[int]) -> list:
    """The last axis taken apart: `[..., sum(sizes)]` to one tensor per size."""
    # TensorFlow's optimizer (2.21, maximum of a monotonic function) turns max_pool(relu(x)) into
    # relu(max_pool(x)) and takes the first output of whatever makes x. A node of one output between
    # them, that is not optimised away, keeps it from taking the wrong part.
    inner = values.shape[1:-1]
    return [
        tf.ensure_shape(part, (None, *inner, size))
        for part, size in zip(tf.split(values, sizes, axis=-1), sizes, strict=True)
    ]


def _stack(dicts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    common = set(dicts[0]).intersection(*dicts[1:])
    return {name: np.stack([np.asarray(d[name]) for d in dicts]) for name in sorted(common)}


@dataclasses.dataclass(frozen=True, eq=False)
class Perturbed:
    """What a group of candidates does on one batch.

    Attributes:
      values: leaf tensor id -> `[N, ..., size]`, in the layout of the group's path; what lies
        elsewhere, by names that the morphism gives.
      moments: statistics of the batch where layers of the path need them, `[n, blocks]` by name.
    """

    values: Mapping[Any, Any]
    moments: Mapping[str, Any]


class Morphism:
    """Interface of a kind of edit. Stateless: everything is in theta and in the arguments.

    Attributes:
      name: by which users and journals know it.
      solved: the names of theta that have a closed form, given those improved by gradient.
      perturbs_by_solved: whether `perturb` needs the solved parameters too.
      reads_producer: whether theta holds incoming weights, under the names of the producers' own
        variables (`name/1` for a second producer), to which `perturb` is given the responses.
      edits_unit: whether a candidate edits the old unit it names, so that two such candidates
        exclude each other; else it brings something new.
      units: by how many units a candidate changes the width of its site.
      together: how many units a candidate is made of; if more than one, theta and state have an
        axis for them behind that of the candidates.
    """

    name: ClassVar[str]
    solved: ClassVar[tuple[str, ...]] = ()
    perturbs_by_solved: ClassVar[bool] = False
    reads_producer: ClassVar[bool] = True
    edits_unit: ClassVar[bool] = True
    units: ClassVar[int] = 1
    together: ClassVar[int] = 1

    def reason(self, site: Site) -> str | None:
        """Why this kind of edit is not possible at a site; None if it is."""
        return site.blocked

    def demand(self, candidate: Candidate) -> Demand:
        """What a candidate brings that costs something."""
        del candidate
        return Demand(units=self.units)

    def newborn(self, candidate: Candidate) -> int:
        """How many new units it brings; asked for when it has been applied, too."""
        del candidate
        return max(0, self.units)

    def group_key(self, candidate: Candidate) -> Hashable:
        """Candidates of a site are stacked with those of an equal key: their shapes are equal."""
        del candidate
        return None

    def candidates(self, site: Site, *, new_units: int, seed: int) -> list[Candidate]:
        """The site's candidates with theta initialised; `cost` is filled in by the caller."""
        raise NotImplementedError

    def taps(self, site: Site) -> list[Tap]:
        """Where gradient and columns are needed."""
        raise NotImplementedError

    def scale(self, site: Site, units: np.ndarray) -> dict[str, np.ndarray]:
        """Natural size of the entries of each learned parameter, `[n]`: the unit of a step.

        Its names are those of theta that are improved by gradient.
        """
        raise NotImplementedError

    def perturb(
        self, capture: Capture, group: Group, theta: Theta, responses: Sequence, fresh: bool
    ) -> Perturbed:
        """What the group's candidates change, or newly bring, at the ends of the site's path.

        Args:
          capture: the batch.
          group: the candidates.
          theta: stacked parameters and measured state.
          responses: per producer, its response `[N, ..., n]` to theta's incoming weights; empty
            if the morphism `reads_producer` not.
          fresh: whether statistics are taken from the batch (while learning) instead of `theta`.
        """
        raise NotImplementedError

    def covectors(
        self, capture: Capture, group: Group, theta: Theta, perturbed: Perturbed
    ) -> dict[Any, Any]:
        """Gradient and columns at what `perturb` returned: leaf -> `[1 + K, N, ..., size]`.

        They must not depend on the values in `perturbed`, only on their shapes.
        """
        raise NotImplementedError

    def scalars(self, group: Group, covectors: Mapping[Any, Any], perturbed: Perturbed) -> Any:
        """Each candidate's perturbation against gradient and columns, `[1 + K, N, n]`."""
        return tf.add_n(
            [
                group.path.per_unit(leaf, covectors[leaf] * value)
                for leaf, value in perturbed.values.items()
            ]
        )

    def slopes(self, group: Group, weights: Any, covectors: Mapping[Any, Any]) -> dict[Any, Any]:
        """The transpose of `scalars`: the gradient of their weighted sum at `perturbed.values`.

        Args:
          group: the candidates.
          weights: `[1 + K, N, n]`.
          covectors: as for `scalars`.
        """
        return {
            leaf: tf.reduce_sum(group.path.spread(leaf, weights, len(c.shape)) * c, axis=0)
            for leaf, c in covectors.items()
        }

    def tangents(self, group: Group, theta: Theta, perturbed: Perturbed) -> dict[Tap, Any]:
        """The sum of all the group's perturbations, by tap: the forward-mode view."""
        raise NotImplementedError

    def no_equations(self, group: Group) -> dict[str, Any]:
        """`equations` of no data: zeros of the same names and shapes."""
        del group
        return {}

    def equations(self, capture: Capture, group: Group, perturbed: Perturbed) -> dict[str, Any]:
        """This batch's sums of the quadratic in the solved parameters; empty when none are.

        The sum of the batch's losses is added to them by the caller, as `"loss"`.
        """
        del capture, group, perturbed
        return {}

    def solve(self, group: Group, sums: Mapping[str, Any], damping: float) -> dict[str, Any]:
        """The solved parameters from summed normal equations, as tensors, damped."""
        raise NotImplementedError

    def choose_damping(self, group: Group, first: Mapping, second: Mapping) -> np.ndarray:
        """The damping `[n]` for `solve`, from the summed equations of two halves of the data."""
        raise NotImplementedError

    def reliance(self, candidate: Candidate, units: Sequence[int]) -> np.ndarray:
        """How much each of some units stands in for the one a candidate takes away, `[units]`."""
        del candidate
        return np.zeros(len(units))

    def edit(self, candidate: Candidate) -> WidthEdit | KernelEdit | HeadsEdit:
        """The change to the model that the candidate stands for."""
        raise NotImplementedError

    def scaled(self, candidate: Candidate, alpha: float) -> Candidate | None:
        """The candidate with its perturbation scaled down; at 0 the function is unchanged.

        None where it can only be applied as a whole: it is left out at scales under 1.
        """
        raise NotImplementedError


class OneByOne(Morphism):
    """A morphism whose groups are one candidate: those of other places differ in shape."""

    def scalars(self, group, covectors, perturbed):
        del group
        products = [covectors[place] * value for place, value in perturbed.values.items()]
        sums = [tf.reduce_sum(p, list(range(2, len(p.shape)))) for p in products]
        return tf.add_n(sums)[..., None]

    def slopes(self, group, weights, covectors):
        del group
        return {
            place: tf.reduce_sum(
                tf.reshape(weights, (weights.shape[0], -1, *[1] * (len(c.shape) - 2))) * c, axis=0
            )
            for place, c in covectors.items()
        }


class AtInputs(Morphism):
    """A morphism whose perturbation lies at channels of what the consumers read.

    Subclasses return it from `perturb`, by default in the layout of the group's path; else they
    say their `order`.
    """

    def taps(self, site):
        return leaf_taps(site)

    def order(self, group: Group, leaf: Leaf) -> np.ndarray:
        """Positions at a leaf of the channels that `perturb` returns, in their order."""
        return where(group, leaf)

    def covectors(self, capture, group, theta, perturbed):
        del theta, perturbed
        return {
            leaf.tensor: take(cotangents_at(capture, leaf), self.order(group, leaf))
            for leaf in group.site.leaves
        }

    def tangents(self, group, theta, perturbed):
        del theta
        tangents = {}
        for leaf in group.site.leaves:
            scatter = tf.one_hot(self.order(group, leaf), leaf.channels.size, dtype=tf.float32)
            delta = perturbed.values[leaf.tensor]
            tangents |= dict.fromkeys(taps_of_leaf(leaf), tf.tensordot(delta, scatter, 1))
        return tangents


def cotangents_at(capture: Capture, leaf: Leaf):
    """Gradient and columns at what a leaf's consumers read, `[1 + K, N, ..., size]`."""
    first, *others = [capture.cotangents[tap] for tap in taps_of_leaf(leaf)]
    return tf.add_n([first, *others]) if others else first


def where(group: Group, leaf: Leaf) -> np.ndarray:
    """Positions of a group's units at a leaf, in the layout of the group's path."""
    return group.path.positions(leaf.tensor, leaf.channels, group.units)
