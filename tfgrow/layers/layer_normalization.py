"""Normalisation over the channels: they can grow only all together."""

import keras
from keras import ops

from tfgrow.layers.growable import Axes, GrowableChannelwise


class _OverChannels(GrowableChannelwise):
    """What is normalised over all channels stays the same if every one of them is there twice."""

    over_channels = True

    def growth_blocked(self):
        if list(self._axes()) not in ([-1], [self._ndim - 1]):
            return (
                f"layer '{self.name}' normalises over the axes {list(self._axes())}; growth needs "
                "it to be the last one alone"
            )
        return None

    def build(self, input_shape):
        super().build(input_shape)
        self._ndim = len(input_shape)

    def _axes(self):
        return self.axis if isinstance(self.axis, (list, tuple)) else [self.axis]


@keras.saving.register_keras_serializable(package="tfgrow")
class LayerNormalization(_OverChannels, keras.layers.LayerNormalization):
    """`keras.layers.LayerNormalization`, whose channels can be doubled: all of them at once."""

    stock_class = keras.layers.LayerNormalization
    variable_axes = {"gamma": Axes(channel=-1), "beta": Axes(channel=-1)}

    def apply_channels(self, inputs, variables):
        return ops.layer_normalization(
            inputs,
            variables.get("gamma"),
            variables.get("beta"),
            -1,
            self.epsilon,
            rms_scaling=self.rms_scaling,
        )


@keras.saving.register_keras_serializable(package="tfgrow")
class RMSNormalization(_OverChannels, keras.layers.RMSNormalization):
    """`keras.layers.RMSNormalization`, whose channels can be doubled: all of them at once."""

    stock_class = keras.layers.RMSNormalization
    variable_axes = {"scale": Axes(channel=-1)}

    def apply_channels(self, inputs, variables):
        return ops.rms_normalization(
            inputs, scale=variables["scale"], axis=-1, epsilon=self.epsilon
        )
