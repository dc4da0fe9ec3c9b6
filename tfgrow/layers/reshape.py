"""Reshape and Permute, where the channels stay on the last axis."""

from __future__ import annotations

import numpy as np
from keras import layers, ops

from tfgrow.layers.growable import Channelwise
from tfgrow.types import ChannelMap


def merged_positions(incoming: ChannelMap, positions: int) -> ChannelMap:
    """Where channels lie when so many neighbouring positions are laid behind one another."""
    offsets = np.arange(positions)[None, :, None] * incoming.size
    index = (incoming.index[:, None, :] + offsets).reshape(incoming.units, -1)
    return ChannelMap(index, incoming.size * positions)


class Reshaped(Channelwise):
    """A Reshape layer whose rows are whole positions: one (channels stay) or several, as Flatten's.

    Its `target_shape` names the number of channels, and follows it.
    """

    def __init__(self, layer: layers.Reshape):
        self._layer = layer

    @property
    def _merged(self) -> int:
        return int(self._layer.output.shape[-1]) // int(self._layer.input.shape[-1])

    def _target(self, channels: int) -> tuple[int, ...]:
        *positions, last = self._layer.target_shape
        return (*positions, last if last == -1 else channels * self._merged)

    def channel_map(self, incoming, input_shape):
        del input_shape
        return merged_positions(incoming, self._merged)

    def resized_attributes(self, channels):
        return {"target_shape": self._target(channels)}

    def apply_channels(self, inputs, variables):
        del variables
        target = self._target(inputs.shape[-1])
        if -1 in target and None not in inputs.shape[1:]:
            known = -int(np.prod(target))
            whole = int(np.prod(inputs.shape[1:]))
            target = tuple(whole // known if size == -1 else size for size in target)
        return ops.reshape(inputs, (ops.shape(inputs)[0], *target))


def reshape_blocked(layer: layers.Reshape) -> str | None:
    """Why the channels aren't on the last axis after a Reshape layer; None if they are."""
    before, after = tuple(layer.input.shape), tuple(layer.output.shape)
    if len(before) > 1 and before[-1] and after[-1] and after[-1] % before[-1] == 0:
        return None
    return (
        f"layer '{layer.name}' (Reshape) makes {after} of {before}, which takes the channels off "
        f"the last axis; reshape to rows that hold whole positions of {before[-1]} channels, and "
        "give the model's input a static shape"
    )


def permute_blocked(layer: layers.Permute) -> str | None:
    """Why the channels aren't on the last axis after a Permute layer; None if they are."""
    if layer.dims[-1] == len(layer.dims):
        return None
    return (
        f"layer '{layer.name}' (Permute) has dims={layer.dims}, which takes the channels off the "
        "last axis; leave that one in its place"
    )
