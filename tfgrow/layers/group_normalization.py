"""GroupNormalization, growable where every channel is a group of its own."""

import keras
from keras import ops

from tfgrow.layers.growable import Axes, GrowableChannelwise


@keras.saving.register_keras_serializable(package="tfgrow")
class GroupNormalization(GrowableChannelwise, keras.layers.GroupNormalization):
    """`keras.layers.GroupNormalization`, which can grow as instance normalization: `groups=-1`.

    Each sample's channel is normalised over its positions, by itself, and so is a new one.
    """

    stock_class = keras.layers.GroupNormalization
    variable_axes = {"gamma": Axes(channel=-1), "beta": Axes(channel=-1)}

    def growth_blocked(self):
        ndim = self.input_spec.ndim
        if self.axis not in (-1, ndim - 1):
            return (
                f"layer '{self.name}' normalises axis {self.axis}; growth needs the channels on "
                "the last axis"
            )
        channels = self.input_spec.axes[self.axis]
        if self.groups != channels:
            return (
                f"layer '{self.name}' normalises {channels} channels in {self.groups} groups, so "
                "that a new unit would change what the others hand on; use BatchNormalization, or "
                "groups=-1, which takes every channel by itself"
            )
        if ndim < 3:
            return f"layer '{self.name}' has no positions to normalise a channel over"
        return None

    def resized_attributes(self, channels):
        return {"groups": channels}

    def apply_channels(self, inputs, variables):
        positions = list(range(1, len(inputs.shape) - 1))
        mean, variance = ops.moments(inputs, axes=positions, keepdims=True)
        scale = ops.rsqrt(variance + self.epsilon) * variables.get("gamma", 1.0)
        return (inputs - mean) * scale + variables.get("beta", 0.0)
