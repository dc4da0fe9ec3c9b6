"""New units as vectors of incoming and of outgoing weights, in which the loss is bilinear.

To first order in both, a new unit with incoming weights `a` and outgoing weights `b` changes the
mean loss by `a' M b`. Row f of `M [A, B]` is the gradient of the loss at the outgoing weights of a
unit that has the f-th incoming weight alone. It is carried through whatever lies between by the
machinery of the morphism `add`, so that nothing here knows a layer by name: convolutions, several
consumers and residual streams are all alike.

What lies between is linearised at zero by its odd part, `[path(er) - path(-er)] / 2e` of a response
`r` at a small `e`: `r/2` for ReLU, `f'(0) r` where there is a derivative. BatchNormalization takes
the mean away, as it does in training, and divides by nothing. Max pooling is not linear: half the
sum of maximum and minimum stands in for it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from tfgrow.capture.batches import Batch, size_of_batch
from tfgrow.capture.capture import (
    Capture,
    capture,
    consumer_taps,
    outside_of,
    producer_inputs,
    producer_responses,
)
from tfgrow.capture.checks import check_loss
from tfgrow.capture.execute import float32_compute, tensor_tap
from tfgrow.capture.path import Path, needs_moments
from tfgrow.curvature.arranging import Arranging
from tfgrow.estimator import total_loss
from tfgrow.graph.nodes import Graph, trace
from tfgrow.graph.sites import Leaf, Site, parameter_name
from tfgrow.layers.growable import Moments
from tfgrow.layers.joins import Join
from tfgrow.morphisms.base import Candidate, Group, Perturbed
from tfgrow.morphisms.registry import candidates as make_candidates
from tfgrow.morphisms.registry import get
from tfgrow.morphisms.weights import as_layer_weights, typical_scale
from tfgrow.strategies.base import Room, Strategy

STEP = 1e-2
"""Size of the largest response at which a path is linearised."""

SILENT = 1e-5
"""What a unit without incoming weights may hand on and still count as silent."""

BENT = 3.0
"""By what factor what a unit hands on may miss being as large in proportion when its response is
`STEP` and when it is 1. A normalisation of each sample by itself misses it by far."""

MOST_WEIGHTS = 5_000
"""Most incoming weights of a unit, and most inputs of a consumer: their squares are kept."""

MOST_PRODUCTS = 2**23
"""Most entries of M."""

MOST_VALUES = 2**25
"""So many values of all basis units are made at once; batches of more are taken in slices."""


LEAST_NORMALISED = 16
"""Each slice is centred by itself behind a BatchNormalization: with fewer samples, what they have
in common is lost."""


class LinearUnits:
    """New units of one site as vectors.

    Attributes:
      like: a candidate of the site that lends the new ones what is no weight of theirs.
      site: the site.
      fan_in: number A of incoming weights.
      fan_out: number B of outgoing weights.
    """

    def __init__(self, like: Candidate, biases: bool):
        self.like = like
        self.site: Site = like.site
        kernels = {
            parameter_name(node.operation.kernel_name, number)
            for number, node in enumerate(self.site.producers)
        }
        shapes = {name: np.shape(value) for name, value in like.theta.items()}
        self._outgoing = {n: shape for n, shape in shapes.items() if n.startswith("phi/")}
        self._incoming = {
            name: shape
            for name, shape in shapes.items()
            if name not in self._outgoing and (biases or name in kernels)
        }
        self.fan_in = _size(self._incoming)
        self.fan_out = _size(self._outgoing)
        self._groups: dict[int, Group] = {}

    def candidate(self, number: int, incoming: np.ndarray, outgoing: np.ndarray) -> Candidate:
        """The unit of two vectors of weights; those that are in neither are zero."""
        theta = {name: np.zeros(np.shape(value)) for name, value in self.like.theta.items()}
        theta |= {name: v[0] for name, v in _apart(incoming[None], self._incoming).items()}
        theta |= {name: v[0] for name, v in _apart(outgoing[None], self._outgoing).items()}
        theta = {name: np.asarray(value, dtype="float32") for name, value in theta.items()}
        return self.like.replace(unit=number, theta=theta)

    def responses(self, captured: Capture, incoming: np.ndarray) -> list:
        """Each producer's response to units' incoming weights `[n, A]`: `[N, ..., n]`."""
        theta = {
            name: np.zeros((len(incoming), *np.shape(value)))
            for name, value in self.like.theta.items()
            if name not in self._outgoing
        }
        theta |= _apart(incoming, self._incoming)
        weights = {name: tf.constant(value, tf.float32) for name, value in theta.items()}
        return [
            node.operation.linear(read, **as_layer_weights(node.operation, weights, number))
            for number, (node, read) in enumerate(
                zip(self.site.producers, producer_inputs(captured, self.site), strict=True)
            )
        ]

    def values(self, captured: Capture, responses: Sequence) -> dict[int, Any]:
        """What arrives at each leaf for a response `[N, ..., n]` of each producer."""
        path = Path(self.site, responses[0].shape[-1])
        live = path.live_variables([int(self.like.state["template"])] * path.count)
        variables: Any = [
            {} if isinstance(step.view, Join) else step.view.newborn_variables(own, None)
            for step, own in zip(path.steps, live, strict=True)
        ]

        def centre(number, inputs):
            """The step's variables, looked up when this is done, take away the mean, no more."""
            step = path.steps[number]
            mean = tf.reduce_mean(inputs, axis=list(range(len(inputs.shape) - 1)))
            variance = tf.ones_like(mean) - getattr(step.layer, "epsilon", 0.0)
            variables[number] = step.view.newborn_variables(live[number], Moments(mean, variance))

        return path.run(responses, variables, outside_of(captured), centre)

    def basis(self, captured: Capture) -> dict[int, Any]:
        """What units with one incoming weight each hand on to each leaf, linearised."""
        eye = np.eye(self.fan_in, dtype="float32")
        return self._odd(captured, self.responses(captured, eye), STEP)

    def gradients(self, captured: Capture, values: Mapping[int, Any]) -> np.ndarray:
        """Sum of the losses' gradients at units' outgoing weights `[n, B]`, given their values."""
        count = next(iter(values.values())).shape[-1] // self._blocks(next(iter(values)))
        if count not in self._groups:
            self._groups[count] = Group(get(self.like.morphism), [self.like] * count)
        group, taps = self._groups[count], consumer_taps(self.site)
        weights = {name: tf.zeros((count, *shape)) for name, shape in self._outgoing.items()}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            tangents = group.morphism.tangents(group, weights, Perturbed(values, {}))
        found = tape.gradient(
            [tangents[tap] for tap in taps],
            list(weights.values()),
            output_gradients=[captured.cotangents[tap][0] for tap in taps],
        )
        together = tf.concat([tf.reshape(part, (count, -1)) for part in found], axis=1)
        return together.numpy().astype("float64")

    def rows(self, leaf: Leaf, values: Any) -> Any:
        """Values at a leaf as `[rows, n]`: samples, positions and blocks."""
        blocks = self._blocks(leaf.tensor)
        path = Path(self.site, values.shape[-1] // blocks)
        apart = path.by_unit(leaf.tensor, values)
        order = [*range(len(apart.shape) - 2), len(apart.shape) - 1, len(apart.shape) - 2]
        return tf.reshape(tf.transpose(apart, order), (-1, path.count))

    def slices(self, captured: Capture) -> Iterator[Capture]:
        """The captured batch in parts small enough for the values of all basis units."""
        samples = len(producer_responses(captured, self.site)[0])
        yield from slices(captured, samples, self._values_per_sample(captured))

    def _values_per_sample(self, captured: Capture) -> int:
        """How many values all basis units have together where they have most."""
        leaves = [captured.values[tensor_tap(leaf.tensor)] for leaf in self.site.leaves]
        values = [*producer_responses(captured, self.site), *leaves]
        return self.fan_in * max(int(np.prod(value.shape[1:-1])) for value in values)

    def why_not(self, captured: Capture) -> str | None:
        """Why the site's units can't be taken for linear near zero; None if they can."""
        slice_size = _slice_size(self._values_per_sample(captured))
        samples = len(producer_responses(captured, self.site)[0])
        if normalised(self.site) and slice_size < min(LEAST_NORMALISED, samples):
            return (
                f"'{self.site.name}' has so many positions that {slice_size} samples fill the "
                "memory, too few for the statistics of its BatchNormalization"
            )
        template = int(self.like.state["template"])
        live = [v[..., template : template + 1] for v in producer_responses(captured, self.site)]
        silent = self.values(captured, [tf.zeros_like(response) for response in live])
        if max(_largest(value) for value in silent.values()) > SILENT:
            return f"a unit of '{self.site.name}' without incoming weights would not be silent"
        near, usual = (self._odd(captured, live, step) for step in (STEP, 1.0))
        for leaf, value in near.items():
            sizes = _largest(value), _largest(usual[leaf])
            if max(sizes) > BENT * min(sizes):
                return f"what '{self.site.name}' hands on is not linear near zero"
        return None

    def _odd(self, captured: Capture, responses: Sequence, step: float) -> dict[int, Any]:
        step /= max(map(_largest, responses)) or 1.0
        up, down = (
            self.values(captured, [size * response for response in responses])
            for size in (step, -step)
        )
        return {leaf: (value - down[leaf]) / (2 * step) for leaf, value in up.items()}

    def _blocks(self, tensor: int) -> int:
        return Path(self.site, 1).maps[tensor].blocks


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """New units that a site could have, the best first.

    Attributes:
      gains: float array `[k]`, what each is worth, in a measure that adds up.
      incoming: `[k, A]`.
      outgoing: `[k, B]`.
    """

    gains: np.ndarray
    incoming: np.ndarray
    outgoing: np.ndarray

    def first(self, count: int) -> Directions:
        """The best of them."""
        return Directions(self.gains[:count], self.incoming[:count], self.outgoing[:count])


class LinearStrategy(Strategy):
    """Base of strategies whose new units are singular vectors of a gradient.

    Sites compete by what their next units are worth per parameter. Those whose units can't be taken
    for linear near zero, or have too many weights, do not take part; the plan's reason names them.
    """

    needs_loss = True

    biases: ClassVar[bool]
    """Whether a new unit's biases are among its incoming weights; else they are zero."""

    _notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def directions(self, room: Room, units: Sequence[LinearUnits]) -> list[Directions]:
        """What new units each of some sites could have."""

    def too_large(self, units: LinearUnits) -> str | None:
        """Why a site's units have too many weights to be looked at; None if they have not."""
        site, fan_in, fan_out = units.site.name, units.fan_in, units.fan_out
        if fan_in <= MOST_WEIGHTS and fan_in * fan_out <= MOST_PRODUCTS:
            return None
        return f"units of '{site}' have {fan_in} incoming and {fan_out} outgoing weights"

    def finished(
        self, room: Room, units: Sequence[LinearUnits], found: Sequence[Directions]
    ) -> list[Candidate]:
        """The chosen units as candidates."""
        del room
        return as_candidates(units, found)

    def choose(self, room: Room) -> list[Candidate]:
        units, left_out = self._units(room)
        found = self.directions(room, units) if units else []
        gains = {one.site.name: each.gains for one, each in zip(units, found, strict=True)}
        extra = most_per_parameter(room, gains)
        chosen = [each.first(extra[one.site.name]) for one, each in zip(units, found, strict=True)]
        notes = [f"left out: {reason}" for reason in left_out]
        if not any(map(len, gains.values())):
            notes.insert(0, "no new unit would gain anything")
        elif not any(extra.values()):
            notes.insert(0, "no further unit fits the budget")
        self._notes = tuple(notes)
        some = [number for number, each in enumerate(chosen) if len(each.gains)]
        return self.finished(room, [units[n] for n in some], [chosen[n] for n in some])

    def _units(self, room: Room) -> tuple[list[LinearUnits], list[str]]:
        """The sites whose units can be taken for linear, and why others can't."""
        names = list(room.sites)
        made = make_candidates(room.model, "add", names, new_units=1, seed=room.seed)
        every = [LinearUnits(like, self.biases) for like in made]
        reasons = [self.too_large(one) for one in every]
        small = [one for one, reason in zip(every, reasons, strict=True) if reason is None]
        if small:
            ((captured, _),) = captures(room, small, room.data.learn[:1])
            with float32_compute(room.model):
                found = iter([one.why_not(captured) for one in small])
            reasons = [next(found) if reason is None else reason for reason in reasons]
        fit = [one for one, reason in zip(every, reasons, strict=True) if reason is None]
        return fit, [reason for reason in reasons if reason is not None]

    def remark(self, chosen: Sequence[Candidate]) -> str:
        return "; ".join(self._notes) or super().remark(chosen)


def captures(
    room: Room, units: Sequence[LinearUnits], batches: Sequence[Batch]
) -> Iterator[tuple[Capture, int]]:
    """Batches with the gradients at the consumers of some sites, and their numbers of samples.

    Layers compute in float32 as long as it runs.
    """
    model, graph = room.model, trace(room.model)
    loss = total_loss(model, graph)
    arranged = Arranging(model, graph, loss)
    taps = [tap for one in units for tap in consumer_taps(one.site)]
    with float32_compute(model):
        for batch in batches:
            yield _captured(graph, loss, arranged(batch), taps), size_of_batch(batch)


def slices(captured: Capture, samples: int, per_sample: int) -> Iterator[Capture]:
    """A captured batch in parts of at most `MOST_VALUES` values, given those of a sample."""
    size = _slice_size(per_sample)
    for start in range(0, samples, size):
        rows = slice(start, start + size)
        yield Capture(_Rows(captured.values, rows), _Rows(captured.cotangents, rows, axis=1))


def _slice_size(per_sample: int) -> int:
    return max(1, MOST_VALUES // max(1, per_sample))


def most_per_parameter(room: Room, gains: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Units to add, one step after the other where the next ones are worth most per parameter.

    Args:
      room: see `Room`.
      gains: by site, what each further unit is worth. There are no more than are named.
    """
    extra = dict.fromkeys(gains, 0)
    open_to = list(gains)
    while open_to:
        spent = room.costs.extra(extra).params
        rates, wider = {}, {}
        for name in list(open_to):
            wanted = room.next_width(name, extra[name]) - room.sites[name].units
            trial = {**extra, name: wanted}
            if wanted > len(gains[name]) or not room.fits(trial):
                open_to.remove(name)
                continue
            worth = float(gains[name][extra[name] : wanted].sum())
            rates[name] = worth / max(1, room.costs.extra(trial).params - spent)
            wider[name] = wanted
        if rates:
            best = max(rates, key=lambda name: rates[name])
            extra[best] = wider[best]
    return extra


def as_candidates(units: Sequence[LinearUnits], found: Sequence[Directions]) -> list[Candidate]:
    """The units of some directions."""
    return [
        one.candidate(number, incoming, outgoing)
        for one, each in zip(units, found, strict=True)
        for number, (incoming, outgoing) in enumerate(
            zip(each.incoming, each.outgoing, strict=True)
        )
    ]


def incoming_norm(site: Site) -> float:
    """The norm of a usual unit's incoming weights, biases left out."""
    square = 0.0
    for node in site.producers:
        layer = node.operation
        kernel = getattr(layer, layer.kernel_name)
        square += typical_scale(layer) ** 2 * int(np.prod(kernel.shape)) / site.units
    return float(np.sqrt(square))


def normalised(site: Site) -> bool:
    """Whether the size of the incoming weights is normalised away on the site's path."""
    return any(needs_moments(step) for step in site.steps)


class _Rows(Mapping):
    """Some samples of tensors, cut out when they are asked for."""

    def __init__(self, values: Mapping, rows: slice, axis: int = 0):
        self._values = values
        self._rows = (slice(None),) * axis + (rows,)

    def __getitem__(self, key):
        return self._values[key][self._rows]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)


def _captured(graph: Graph, loss: Any, batch: Any, taps: Sequence) -> Capture:
    x, y, weights = batch
    captured = capture(
        graph,
        loss.heads,
        x,
        taps,
        gradient_of=lambda z: dict(enumerate(loss.gradient(y, z, weights))),
        columns_of=lambda _: [],
    )
    check_loss(loss.value(y, [captured.values[head.tap] for head in loss.heads], weights))
    return captured


def _size(shapes: Mapping[str, tuple]) -> int:
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())


def _apart(vectors: np.ndarray, shapes: Mapping[str, tuple]) -> dict[str, np.ndarray]:
    """Vectors `[n, size]` as the parameters they are made of, `[n, *shape]` each."""
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()]
    parts = np.split(vectors, np.cumsum(sizes)[:-1], axis=1)
    return {
        name: part.reshape(len(vectors), *shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _largest(value: Any) -> float:
    return float(tf.reduce_max(tf.abs(value)))
