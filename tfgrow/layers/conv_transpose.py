"""Conv1DTranspose, Conv2DTranspose and Conv3DTranspose, growable."""

import math

import keras
import numpy as np
from keras import ops

from tfgrow.layers.growable import Axes, Mixing, channels_last_only


class _ConvTranspose(Mixing):
    """What the transposed convolutions share; the Keras class beside it brings the rest."""

    units_attribute = "filters"
    variable_axes = {"kernel": Axes(fan_in=-1, fan_out=-2), "bias": Axes(fan_out=-1)}

    def growth_blocked(self):
        return channels_last_only(self)

    @property
    def absorbs_constant(self):
        return self.use_bias

    def linear(self, inputs, kernel, bias=None):
        outputs = ops.conv_transpose(
            inputs,
            kernel,
            strides=list(self.strides),
            padding=self.padding,
            output_padding=self.output_padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
        return outputs if bias is None else outputs + bias

    def unfold(self, inputs):
        # Every channel by itself, spread by one-hot kernels: each tap's input where it is added.
        taps = int(np.prod(self.kernel_size))
        one_hot = np.eye(taps, dtype="float32").reshape((*self.kernel_size, taps, 1))
        spatial, channels = ops.shape(inputs)[1:-1], inputs.shape[-1]
        to_front = (0, self.rank + 1, *range(1, self.rank + 1))
        each = ops.reshape(ops.transpose(inputs, to_front), (-1, *spatial, 1))
        seen = self.linear(each, ops.cast(one_hot, inputs.dtype))
        positions = -1 if None in seen.shape[1:-1] else int(np.prod(seen.shape[1:-1]))
        return ops.reshape(seen, (ops.shape(inputs)[0], channels, positions, taps))

    def flops_per_weight(self, output_shape):
        # A weight is used once per position of the *input*; the output's size is affine in it.
        of_one = self.compute_output_shape((1, *[1] * self.rank, 1))[1:-1]
        sizes = zip(output_shape[1:-1], of_one, self.strides, strict=True)
        return 2 * math.prod(1 + (n - one) // stride for n, one, stride in sizes if n is not None)


@keras.saving.register_keras_serializable(package="tfgrow")
class Conv1DTranspose(_ConvTranspose, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` whose filters can grow."""

    stock_class = keras.layers.Conv1DTranspose


@keras.saving.register_keras_serializable(package="tfgrow")
class Conv2DTranspose(_ConvTranspose, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` whose filters can grow. Same arguments, weights and outputs.

    Example:

    >>> import numpy as np, tfgrow
    >>> layer = tfgrow.layers.Conv2DTranspose(4, 3, strides=2, padding="same")
    >>> layer(np.ones((1, 8, 8, 3), "float32")).shape
    TensorShape([1, 16, 16, 4])
    """

    stock_class = keras.layers.Conv2DTranspose


@keras.saving.register_keras_serializable(package="tfgrow")
class Conv3DTranspose(_ConvTranspose, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` whose filters can grow."""

    stock_class = keras.layers.Conv3DTranspose
