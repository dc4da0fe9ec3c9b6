"""DepthwiseConv1D and DepthwiseConv2D, growable."""

import keras
from keras import ops

from tfgrow.layers.activations import is_elementwise, unknown_activation
from tfgrow.layers.growable import Axes, GrowableChannelwise, channels_last_only
from tfgrow.types import ChannelMap


class _DepthwiseConv(GrowableChannelwise):
    """What depthwise convolutions share; the Keras class beside it brings the rest.

    With `depth_multiplier` m, input channel c becomes the outputs c*m ... c*m + m - 1.
    """

    variable_axes = {"kernel": Axes(channel=-2), "bias": Axes(channel=-1)}

    def growth_blocked(self):
        if not is_elementwise(self.activation):
            return unknown_activation(self)
        return channels_last_only(self)

    def channel_map(self, incoming, input_shape):
        del input_shape
        m = self.depth_multiplier
        index = incoming.index[:, :, None] * m + range(m)
        return ChannelMap(index.reshape(incoming.units, -1), incoming.size * m)

    def variable_map(self, name, incoming):
        return self.channel_map(incoming, ()) if name == "bias" else incoming

    def apply_channels(self, inputs, variables):
        outputs = ops.depthwise_conv(
            inputs,
            variables["kernel"],
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
        outputs = outputs + variables["bias"] if "bias" in variables else outputs
        return outputs if self.activation is None else self.activation(outputs)


@keras.saving.register_keras_serializable(package="tfgrow")
class DepthwiseConv1D(_DepthwiseConv, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` whose channels grow with those of its producer."""

    stock_class = keras.layers.DepthwiseConv1D


@keras.saving.register_keras_serializable(package="tfgrow")
class DepthwiseConv2D(_DepthwiseConv, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` whose channels grow with those of its producer."""

    stock_class = keras.layers.DepthwiseConv2D
