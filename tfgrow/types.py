"""The values that flow through tfgrow, each frozen: read this file first.

    model -graph-> Site -morphisms-> Candidate -oracle-> Plan -surgery-> GrowthEvent

Words and letters used everywhere:

* `N` samples of a batch, `K` curvature columns, `P` output positions of a consumer (1 for
  Dense on vectors, H*W for a 2-D convolution), `T` taps of its kernel (1 for Dense, kh*kw for
  Conv2D), `B` blocks (how many consumer inputs one channel feeds per position: H*W after a
  Flatten, else 1), `n` candidates, `O` outputs of a consumer.
* A *unit* is one output channel of a producer (a Dense unit, a convolution's filter).
* Channels are the last axis of every activation (`data_format="channels_last"`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

NEWBORN = -1
"""Source index of a unit that descends from no unit of the old layer."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelMap:
    """Where the channels of a site lie on the last axis of some tensor.

    Attributes:
      index: int array `[units, blocks]`; `index[c, b]` is the position on that axis of block `b`
        of channel `c`.
      size: length of that axis.
    """

    index: np.ndarray
    size: int

    @classmethod
    def identity(cls, units: int) -> ChannelMap:
        """The map of a tensor whose last axis is the channels themselves."""
        return cls(np.arange(units)[:, None], units)

    @property
    def units(self) -> int:
        return self.index.shape[0]

    @property
    def blocks(self) -> int:
        return self.index.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class AxisSource:
    """How the entries of one resized axis descend from the entries it had before.

    Attributes:
      axis: non-negative axis of the variable.
      source: int array `[new_size]`, the old entry each new one descends from, or `NEWBORN`.
      value_scale: float array `[new_size]`, how a weight-like quantity (a moving average of
        weights) is inherited: 1, or 1/2 for a half of a split outgoing weight.
      gradient_scale: float array `[new_size]`, the loss gradient with respect to the new entry
        divided by the one with respect to its source: how optimizer moments are inherited.
      newborn_zero: whether newborn entries are zero in the function-preserving image of other
        weights (outgoing weights of new units); else they take the value given with the change.
      fold: float array `[old_size, old_size]` that weight-like quantities are multiplied by along
        the axis before they are inherited (removed units' weights go to those that stand in for
        them), or None.
      fold_axes: how many axes, from `axis` on, `fold` goes along as one.
    """

    axis: int
    source: np.ndarray
    value_scale: np.ndarray
    gradient_scale: np.ndarray
    newborn_zero: bool = False
    fold: np.ndarray | None = None
    fold_axes: int = 1

    def folded(self, values: np.ndarray) -> np.ndarray:
        """Weight-like values of the old shape after `fold`."""
        if self.fold is None:
            return values
        before, behind = values.shape[: self.axis], values.shape[self.axis + self.fold_axes :]
        merged = values.reshape(*before, len(self.fold), *behind)
        moved = np.tensordot(self.fold, merged, axes=(1, self.axis))
        return np.moveaxis(moved, 0, self.axis).reshape(values.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class VariableChange:
    """The new value of one variable, and how its entries descend from the old ones.

    Attributes:
      value: the new value.
      sources: how its axes descend from the old ones, those that do not stay as they are.
      shift: what was added to it besides (a constant that stands in for removed units), shaped
        like it or one number.
    """

    value: np.ndarray
    sources: tuple[AxisSource, ...] = ()
    shift: np.ndarray | float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class LayerChange:
    """Everything surgery does to one layer.

    Attributes:
      layer: the live Keras layer.
      attributes: config attributes to set, e.g. `{"filters": 12}`.
      variables: changes by variable attribute, e.g. `{"kernel": ..., "moving_mean": ...}`.
        Variables that are not named keep their values (and shapes).
      build_shapes: by sub-layer, the shapes it would be built on now, where those differ.
      inserted: of a layer that is new, its weights `at_rest` (see `NewLayer`); else None.

    Attributes and variables of sub-layers are named by dotted paths: `"_query_dense.kernel"`.
    """

    layer: Any
    attributes: Mapping[str, Any]
    variables: Mapping[str, VariableChange]
    build_shapes: Mapping[str, Mapping[str, tuple]] = dataclasses.field(default_factory=dict)
    inserted: tuple[np.ndarray, ...] | None = None

    def edited(self) -> Iterator[tuple[Any, VariableChange]]:
        """The live variables that change, and how."""
        for name, change in self.variables.items():
            yield operator.attrgetter(name)(self.layer), change


@dataclasses.dataclass(frozen=True, eq=False)
class NewUnit:
    """One unit that a width edit makes, or an old one that it changes.

    Attributes:
      source: the old unit it descends from, or `NEWBORN`.
      fan_in: the producer's weights of the unit: `{"kernel": [..., in], "bias": []}`.
      path: per step of the site, the unit's variables there, each `[..., blocks]`.
      fan_out: per consumer (in the order of `Site.consumers`), the share of the source's outgoing
        weights that the unit takes over (a float), or a newborn's own weights `[T, B, O]`.
      gradient_scale: loss gradient with respect to the unit's incoming weights, divided by the
        one with respect to its source's.
    """

    source: int
    fan_in: Mapping[str, np.ndarray]
    path: tuple[Mapping[str, np.ndarray], ...]
    fan_out: tuple[Any, ...]
    gradient_scale: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class RemovedUnit:
    """What stands in, at the consumers, for a unit that is taken away.

    Attributes:
      shares: float array `[units]`: its values are taken as the sum of the site's other units'
        values (its own entry counts for nothing), times these, ...
      offset: ... plus this, at every position that a consumer's kernel reaches, beyond the border
        too. Only for sites all of whose consumers have an `absorber_of` constants.
    """

    shares: np.ndarray
    offset: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class WidthEdit:
    """An edit of one site's width: all that surgery knows of split, add, prune, widen...

    Attributes:
      site: the site edited.
      replaced: old units that change, by index.
      appended: units added at the end.
      removed: old units that go, by index.
    """

    site: Any
    replaced: Mapping[int, NewUnit] = dataclasses.field(default_factory=dict)
    appended: tuple[NewUnit, ...] = ()
    removed: Mapping[int, RemovedUnit] = dataclasses.field(default_factory=dict)

    @property
    def new_width(self) -> int:
        """Units of the site after the edit."""
        return self.site.units + len(self.appended) - len(self.removed)


@dataclasses.dataclass(frozen=True, eq=False)
class NewHeads:
    """One unit of attention that an edit makes, or an old one that it changes.

    Attributes:
      source: the old unit it descends from, or `NEWBORN`.
      weights: its incoming weights by name, `{"query": [heads, in, size], "query_bias": ...}`.
      projection: the share of the source's part of the output projection that it takes over (a
        float), or a newborn's own part `[depth, outputs]`.
      gradient_scale: loss gradient with respect to the incoming weights, divided by the one with
        respect to the source's.
    """

    source: int
    weights: Mapping[str, np.ndarray]
    projection: Any
    gradient_scale: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class RemovedHeads:
    """What stands in for a unit of attention that is taken away.

    Attributes:
      shares: float array `[units * depth, depth]`: its context is taken as the contexts of the
        layer's other units (its own rows count for nothing) times these, ...
      offset: float array `[depth]`, ... plus this constant.
    """

    shares: np.ndarray
    offset: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class HeadsEdit:
    """A change of the number of heads of one attention layer.

    Attributes:
      site: the layer's site, whose units are groups of heads.
      replaced: old units that change, by index.
      appended: units added at the end.
      removed: old units that go, by index.
    """

    site: Any
    replaced: Mapping[int, NewHeads] = dataclasses.field(default_factory=dict)
    appended: tuple[NewHeads, ...] = ()
    removed: Mapping[int, RemovedHeads] = dataclasses.field(default_factory=dict)

    @property
    def new_width(self) -> int:
        """Units of the layer after the edit."""
        return self.site.units + len(self.appended) - len(self.removed)


@dataclasses.dataclass(frozen=True, eq=False)
class KernelEdit:
    """A convolution's kernel becomes larger, around the one it has.

    Attributes:
      site: the site that the convolution is a producer of.
      producer: its number among the site's producers.
      attributes: config attributes to set.
      offset: where the old kernel begins in the new one, per spatial axis.
      ring: the new kernel `[*kernel_size, in, out]`, of which the part taken by the old one counts
        for nothing.
    """

    site: Any
    producer: int
    attributes: Mapping[str, Any]
    offset: tuple[int, ...]
    ring: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class NewLayer:
    """A layer that an edit inserts.

    Attributes:
      layer_class: its class.
      config: its arguments; `name` is the wanted one, to which a number is added if it is taken.
      weights: its weights.
      at_rest: the weights with which the branch it belongs to would change nothing.
    """

    layer_class: Any
    config: Mapping[str, Any]
    weights: tuple[np.ndarray, ...]
    at_rest: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class BranchEdit:
    """A new branch: the output of a layer becomes itself plus what new layers make of another's.

    Attributes:
      site: the site at whose end the branch is added.
      source: name of the layer whose output the branch reads.
      target: name of the layer to whose output it is added; may be the source.
      layers: the new layers, in order.
    """

    site: Any
    source: str
    target: str
    layers: tuple[NewLayer, ...]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an edit costs: parameters, trainable or not, and inference FLOPs per sample."""

    params: int = 0
    flops: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Demand:
    """What an edit brings that costs something.

    Attributes:
      units: units added to its site; negative if it takes some away.
      kernels: layer name -> its new `kernel_size`.
      more: what it costs besides.
      fixed: tensors whose channels must stay what they are for it: ids.
    """

    units: int = 0
    kernels: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    more: Cost = Cost()
    fixed: tuple[int, ...] = ()


SWEEPS = 200
"""Of coordinate descent, at most."""

RIDGE = 0.1
"""How much of its own curvature is added to each candidate's: an interaction is of few samples."""


def damping_of(gram: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """What is added to the diagonal of a gram matrix `[n, n]`; never zero."""
    diagonal = np.diag(gram)
    return ridge * diagonal + max(1e-12 * np.max(diagonal, initial=0.0), 1e-30)


def _descend(
    gram: np.ndarray, linear: np.ndarray, start: np.ndarray, least: np.ndarray, most: np.ndarray
) -> np.ndarray:
    """The minimum of a quadratic within bounds, one coordinate after the other."""
    lengths, slope = start.copy(), linear + gram @ start
    for _ in range(SWEEPS):
        before = lengths.copy()
        for i, curvature in enumerate(np.diag(gram)):
            step = np.clip(lengths[i] - slope[i] / curvature, least[i], most[i]) - lengths[i]
            if step:
                lengths[i] += step
                slope += step * gram[:, i]
        if np.abs(lengths - before).max(initial=0.0) < 1e-6:
            break
    return lengths


@dataclasses.dataclass(frozen=True, eq=False)
class Interaction:
    """The Gauss-Newton quadratic over a set of candidates.

    Attributes:
      linear: float array `[n]`, each candidate's first-order change of the mean loss.
      gram: float array `[n, n]`, the curvature between candidates.
    """

    linear: np.ndarray
    gram: np.ndarray

    def of(self, subset) -> Interaction:
        """That of some candidates, by their indices."""
        rows = np.asarray(subset, dtype=int)
        return Interaction(self.linear[rows], self.gram[np.ix_(rows, rows)])

    def at(self, lengths) -> Interaction:
        """That of the candidates at other lengths, `[n]`; at 1 they are as they were learned."""
        lengths = np.asarray(lengths)
        return Interaction(self.linear * lengths, self.gram * np.outer(lengths, lengths))

    def best_lengths(
        self, ridge: float = RIDGE, least: Any = -np.inf, most: Any = np.inf
    ) -> np.ndarray:
        """The lengths `[n]` of all candidates at which their joint change is least, damped.

        Args:
          ridge: how much of its own curvature is added to each candidate's.
          least: bound of the lengths, a number or `[n]`.
          most: the other bound.

        Example:

        >>> import numpy as np
        >>> twins = Interaction(np.array([-1.0, -1.0]), np.array([[1.0, 1.0], [1.0, 1.0]]))
        >>> twins.best_lengths(ridge=1e-6).round(3).tolist()
        [0.5, 0.5]
        >>> twins.best_lengths(ridge=1e-6, most=[0.2, 1.0]).round(3).tolist()
        [0.2, 0.8]
        """
        gram = 0.5 * (self.gram + np.transpose(self.gram))
        gram = gram + np.diag(damping_of(gram, ridge))
        lengths = -np.linalg.solve(gram, self.linear)
        least, most = np.broadcast_to(least, lengths.shape), np.broadcast_to(most, lengths.shape)
        if ((least <= lengths) & (lengths <= most)).all():
            return lengths
        return _descend(gram, self.linear, np.clip(lengths, least, most), least, most)

    def change(self, subset=None) -> float:
        """Estimated change of the mean loss when the candidates in `subset` are applied at once.

        Args:
          subset: candidate indices (all of them by default).
        """
        index = np.arange(len(self.linear)) if subset is None else np.asarray(subset, dtype=int)
        return float(self.linear[index].sum() + 0.5 * self.gram[np.ix_(index, index)].sum())

    @property
    def scores(self) -> np.ndarray:
        """Estimated change `[n]` of each candidate applied alone."""
        return self.linear + 0.5 * np.diag(self.gram)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What an oracle proposes for one growth step.

    Attributes:
      candidates: the chosen `Candidate`s, in the order they were picked.
      estimated_change: joint estimate of the change of the mean loss (negative is better); None
        from a strategy that makes none.
      cost: what applying all of them adds to the model.
      widths: site name -> (units before, units after).
      seconds: seconds spent per phase (`"learn"`, `"score"`, `"select"`, ...).
      reason: why nothing was chosen, or why choosing stopped; in words.
    """

    candidates: tuple
    estimated_change: float | None
    cost: Cost
    widths: Mapping[str, tuple[int, int]]
    seconds: Mapping[str, float]
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class GrowthEvent:
    """What one growth step did; JSON-ready through `to_json`.

    Attributes:
      epoch: number of epochs completed before the event (0 outside `fit`).
      applied: one dict per site and morphism: `{"site", "morphism", "units"}`.
      widths: site name -> (units before, units after).
      params_before, params_after: `model.count_params()`.
      flops_before, flops_after: inference FLOPs per sample.
      estimated_change: joint estimate at the committed scale, None if there is none.
      measured_change: really measured change of the mean loss on held-out batches, or None.
      loss_before: mean loss on those batches before the event, or None.
      alpha: the scale at which the guard committed the set (1: as learned); 0 if it was rejected.
      seconds: seconds per phase.
      newborn: site name -> number of new units.
      newborn_alive: share of the newborn units active an epoch later, None until known.
      status: `"applied"`, `"rejected"` (by the guard) or `"nothing"` (no candidate paid).
      reason: in words, why it was rejected or nothing was chosen.
      trial_id: the oracle's trial that holds the event, if any.
      averaged: whether the model grew at the running average of its weights.
    """

    epoch: int
    applied: tuple[Mapping[str, Any], ...]
    widths: Mapping[str, tuple[int, int]]
    params_before: int
    params_after: int
    flops_before: int
    flops_after: int
    estimated_change: float | None
    measured_change: float | None
    loss_before: float | None
    alpha: float
    seconds: Mapping[str, float]
    newborn: Mapping[str, int]
    newborn_alive: float | None = None
    status: str = "applied"
    reason: str = ""
    trial_id: str | None = None
    averaged: bool = False

    @property
    def realized(self) -> float | None:
        """Measured over estimated change of the loss: 1 where the estimate came true.

        None where one of them is missing, or nothing was applied.
        """
        if self.status != "applied" or self.measured_change is None or not self.estimated_change:
            return None
        return self.measured_change / self.estimated_change

    def to_json(self) -> dict[str, Any]:
        """The event as plain JSON types, `realized` with it; `from_json` is the inverse."""
        return {**dataclasses.asdict(self), "realized": self.realized}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GrowthEvent:
        data = {name: value for name, value in data.items() if name != "realized"}
        data["applied"] = tuple(data["applied"])
        data["widths"] = {name: tuple(pair) for name, pair in data["widths"].items()}
        return cls(**data)


def describe_widths(widths: Mapping[str, tuple[int, int]]) -> str:
    """What changed, in words.

    Example:

    >>> describe_widths({"conv1": (4, 6), "conv2": (8, 8)})
    'conv1 4->6'
    """
    return ", ".join(f"{n} {old}->{new}" for n, (old, new) in widths.items() if old != new)
