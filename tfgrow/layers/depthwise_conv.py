"""Convolutions of every channel by itself, growable."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from tfgrow.layers.activations import is_elementwise, unknown_activation
from tfgrow.layers.growable import Axes, GrowableChannelwise, channels_last_only
from tfgrow.layers.larger_kernel import LargerKernel
from tfgrow.types import ChannelMap


class DepthwiseConv(GrowableChannelwise, LargerKernel):
    """What depthwise convolutions share; the Keras class beside it brings the rest.

    With `depth_multiplier` m, input channel c becomes the outputs c*m ... c*m + m - 1.
    """

    depth_multiplier: Any

    def growth_blocked(self):
        if not is_elementwise(self.activation):
            return unknown_activation(self)
        return channels_last_only(self)

    def channel_map(self, incoming, input_shape):
        del input_shape
        m = self.depth_multiplier
        index = incoming.index[:, :, None] * m + range(m)
        return ChannelMap(index.reshape(incoming.units, -1), incoming.size * m)

    def apply_channels(self, inputs, variables):
        return self.activate(self.linear(inputs, **variables))

    def linear(self, inputs, kernel, bias=None):
        outputs = self._convolve(inputs, kernel, self.padding)
        return outputs if bias is None else outputs + bias

    def linear_enlarged(self, inputs, kernel):
        return self._convolve(inputs, kernel, "same")

    def _convolve(self, inputs, kernel, padding):
        size, channels = kernel.shape[:-2], inputs.shape[-1]
        return ops.depthwise_conv(
            inputs,
            ops.reshape(kernel, (*size, channels, -1)),
            strides=self.strides,
            padding=padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )

    def inputs_at(self, inputs, kernel_size, tap):
        """What every output position sees through one tap of a larger kernel.

        Args:
          inputs: `[N, ..., c]`.
          kernel_size: of the larger kernel.
          tap: number of the tap, in the order of the kernel's entries.

        Returns:
          `[N, ..., c]`, of the outputs' spatial shape.
        """
        pads, slices = [(0, 0)], [slice(None)]
        for axis, at in enumerate(np.unravel_index(tap, kernel_size)):
            size, stride = ops.shape(inputs)[1 + axis], self.strides[axis]
            dilation = self.dilation_rate[axis]
            positions = (size + stride - 1) // stride
            reach = (positions - 1) * stride + 1
            missing = reach + (kernel_size[axis] - 1) * dilation - size
            missing = max(missing, 0) if isinstance(missing, int) else ops.maximum(missing, 0)
            pads.append((missing // 2, missing - missing // 2))
            start = int(at) * dilation
            slices.append(slice(start, start + reach, stride))
        return ops.pad(inputs, [*pads, (0, 0)])[tuple(slices)]


class _Depthwise(DepthwiseConv):
    """Of layers whose kernel is `[..., in, depth_multiplier]`."""

    variable_axes = {"kernel": Axes(channel=-2), "bias": Axes(channel=-1)}

    def variable_map(self, name, incoming):
        return self.channel_map(incoming, ()) if name == "bias" else incoming


@keras.saving.register_keras_serializable(package="tfgrow")
class DepthwiseConv1D(_Depthwise, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` whose channels grow with those of its producer."""

    stock_class = keras.layers.DepthwiseConv1D


@keras.saving.register_keras_serializable(package="tfgrow")
class DepthwiseConv2D(_Depthwise, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` whose channels grow with those of its producer."""

    stock_class = keras.layers.DepthwiseConv2D


class _GroupPerChannel(DepthwiseConv):
    """Of convolutions of as many groups as channels, whose kernel is `[..., 1, filters]`."""

    variable_axes = {"kernel": Axes(channel=-1), "bias": Axes(channel=-1)}
    filters: Any
    groups: Any

    @classmethod
    def takes(cls, layer):
        kernel = getattr(layer, "kernel", None)
        return kernel is not None and kernel.shape[-2] == 1 < layer.groups

    @property
    def depth_multiplier(self):
        return self.filters // self.groups

    def growth_blocked(self):
        if self.lora_enabled or getattr(self, "quantization_mode", None):
            return f"layer '{self.name}' has LoRA or quantized weights, which can't be resized"
        if len(set(self.strides)) > 1 or self.padding == "causal":
            return (
                f"layer '{self.name}' has as many groups as channels, and strides={self.strides} "
                f"and padding='{self.padding}', which depthwise convolutions can't have: give it "
                "equal strides and padding 'same' or 'valid'"
            )
        return super().growth_blocked()

    def variable_map(self, name, incoming):
        del name
        return self.channel_map(incoming, ())

    def resized_attributes(self, channels):
        return {"groups": channels, "filters": channels * self.depth_multiplier}


@keras.saving.register_keras_serializable(package="tfgrow")
class ChannelwiseConv1D(_GroupPerChannel, keras.layers.Conv1D):
    """`keras.layers.Conv1D` of as many groups as channels, which grow with their producer's."""

    stock_class = keras.layers.Conv1D


@keras.saving.register_keras_serializable(package="tfgrow")
class ChannelwiseConv2D(_GroupPerChannel, keras.layers.Conv2D):
    """`keras.layers.Conv2D` of as many groups as channels, which grow with their producer's."""

    stock_class = keras.layers.Conv2D
