"""A site's path as a function of its producers' responses, for any set of units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrow.graph.sites import Site, Step, channel_maps, response_id, steps_with_activation
from tfgrow.layers.growable import Growable, Moments
from tfgrow.layers.joins import Join
from tfgrow.types import ChannelMap

PathVariables = tuple[Mapping[str, Any], ...]
"""Per step of `Path.steps`, the variables of the units under study, by name."""


Observe = Callable[[int, Any], None]

Outside = Callable[[int], Any]
"""Tensor id -> the value of a tensor that the path reads but that carries none of its channels."""

Units = Sequence[int] | np.ndarray


class Path:
    """The way of `count` units of a site from the producers' responses to the consumers' inputs.

    Layouts: a response is `[N, ..., count]`; what arrives at a leaf is `[N, ..., size]`, whose
    last axis `maps[leaf.tensor]` explains.

    Attributes:
      steps: the producers' own activations, then the site's steps.
      maps: tensor id -> `ChannelMap` of the `count` units there.
    """

    def __init__(self, site: Site, count: int):
        self.site = site
        self.count = count
        self.steps: tuple[Step, ...] = steps_with_activation(site)
        self.maps: dict[int, ChannelMap] = channel_maps(site, count)

    def positions(self, tensor: int, full: ChannelMap, units: Units) -> np.ndarray:
        """Positions of `units` on the model's axis of a tensor, in the layout of this path.

        Args:
          tensor: id of the tensor.
          full: where all of the site's channels lie on its last axis.
          units: `count` units.
        """
        return _positions(self.maps[tensor], full, units)

    def live_variables(self, units: Sequence[int]) -> PathVariables:
        """The present variables, in float32, of some of the site's units."""
        return tuple(
            {
                name: take(
                    tf.cast(tf.convert_to_tensor(variable), tf.float32),
                    _positions(
                        step.view.variable_map(name, self.maps[step.source]),
                        step.view.variable_map(name, step.incoming),
                        units,
                    ),
                    step.layer.variable_axes[name].channel,
                )
                for name, variable in _variables(step).items()
            }
            for step in self.steps
        )

    def run(
        self,
        responses: Sequence,
        variables: PathVariables,
        outside: Outside,
        observe: Observe | None = None,
    ) -> dict[int, Any]:
        """What arrives at each leaf (tensor id -> value) for a response of each producer.

        Args:
          responses: per producer of the site, `[N, ..., count]`.
          variables: as from `live_variables`.
          outside: see `Outside`.
          observe: called with a step's number and input where the layer needs moments.
        """

        def pass_step(number, step, inputs):
            if observe is not None and needs_moments(step):
                observe(number, inputs)
            return step.view.apply_channels(inputs, variables[number])

        return self._walk(responses, outside, pass_step)

    def run_newborn(
        self,
        responses: Sequence,
        templates: PathVariables,
        outside: Outside,
        keep: Callable[[int, Moments], None],
    ) -> dict[int, Any]:
        """`run` for new units, whose statistics are those of the batch itself: `keep` gets them."""

        def pass_step(number, step, inputs):
            moments = None
            if needs_moments(step):
                moments = batch_moments(inputs)
                keep(number, moments)
            return step.view.apply_channels(
                inputs, step.view.newborn_variables(templates[number], moments)
            )

        return self._walk(responses, outside, pass_step)

    def _walk(self, responses, outside: Outside, pass_step: Callable) -> dict[int, Any]:
        values = {response_id(number): value for number, value in enumerate(responses)}
        for number, step in enumerate(self.steps):
            if isinstance(step.view, Join):
                values[step.target] = _join(step, values, outside)
            else:
                values[step.target] = pass_step(number, step, values[step.source])
        return {leaf.tensor: values[leaf.tensor] for leaf in self.site.leaves}

    def by_unit(self, tensor: int, values):
        """The last axis taken apart: `[..., size] -> [..., count, blocks]`."""
        return apart(values, self.maps[tensor])

    def lay_out(self, tensor: int, values):
        """The inverse of `by_unit`: `[..., count, blocks] -> [..., size]`."""
        mine = self.maps[tensor]
        if mine.blocks == 1:
            return tf.squeeze(values, -1)
        order = np.empty(mine.size, dtype=np.int64)
        order[mine.index.reshape(-1)] = np.arange(mine.size)
        return take(tf.reshape(values, [*sizes_of(values, slice(-2)), mine.size]), order)

    def per_unit(self, tensor: int, values):
        """Sums over positions and blocks: `[1 + K, N, ..., size] -> [1 + K, N, count]`."""
        flat = _sum_positions(values)
        if self.maps[tensor].blocks == 1:
            return flat
        return tf.reduce_sum(self.by_unit(tensor, flat), axis=-1)

    def spread(self, tensor: int, values, rank: int):
        """The transpose of `per_unit`: `[1 + K, N, count] -> [1 + K, N, 1, ..., size]`.

        Args:
          tensor: id of the tensor.
          values: a number per candidate.
          rank: number of the result's axes.
        """
        spread = take(values, _owners(self.maps[tensor]))
        return tf.reshape(spread, (values.shape[0], -1, *[1] * (rank - 3), spread.shape[-1]))


def needs_moments(step: Step) -> bool:
    """Whether a step keeps statistics of its input."""
    return not isinstance(step.view, Join) and step.view.needs_moments


def _join(step: Step, values, outside: Outside):
    """A join of several tensors; those that carry other sites' channels alone are None."""
    assert isinstance(step.view, Join) and step.node is not None  # noqa: PT018
    read = {tensor: values[tensor] for tensor in step.sources}
    read |= {tensor: outside(tensor) for tensor in step.outside}
    return step.view.combine(*step.node.arguments(read))


def _owners(mine: ChannelMap) -> np.ndarray:
    """Which unit each position on the axis belongs to, `[size]`."""
    owners = np.empty(mine.size, dtype=np.int64)
    owners[mine.index] = np.arange(len(mine.index))[:, None]
    return owners


def _positions(mine: ChannelMap, full: ChannelMap, units: Units) -> np.ndarray:
    flat = np.empty(mine.size, dtype=np.int64)
    flat[mine.index] = full.index[np.asarray(units)]
    return flat


def _sum_positions(values):
    """`[1 + K, N, ..., size] -> [1 + K, N, size]`."""
    return tf.reduce_sum(values, axis=list(range(2, len(values.shape) - 1)))


def apart(values, channels: ChannelMap):
    """The last axis taken apart by a site's units: `[..., size] -> [..., units, blocks]`."""
    grouped = take(values, channels.index.reshape(-1))
    if channels.blocks == 1:
        return tf.expand_dims(grouped, -1)
    return tf.reshape(grouped, [*sizes_of(values, slice(-1)), *channels.index.shape])


def sizes_of(values, axes: slice) -> list:
    """A tensor's sizes along some axes: numbers where they are known."""
    sizes = list(enumerate(values.shape))[axes]
    return [tf.shape(values)[axis] if size is None else size for axis, size in sizes]


def take(values, index: np.ndarray, axis: int = -1):
    """`tf.gather` along a channel axis, left out where it would change nothing."""
    if len(index) == values.shape[axis] and (index == np.arange(len(index))).all():
        return values
    return tf.gather(values, index, axis=axis)


def batch_moments(values) -> Moments:
    """Mean and variance `[size]` over all axes but the last."""
    mean, variance = tf.nn.moments(values, axes=list(range(len(values.shape) - 1)))
    return Moments(mean, variance)


def _variables(step: Step) -> Mapping[str, Any]:
    """A step's channel variables; a producer's own activation has none of its own."""
    own = isinstance(step.layer, Growable) and step.view is step.layer
    return step.layer.growable_variables() if own else {}
