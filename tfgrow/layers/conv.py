"""Conv1D, Conv2D and Conv3D, growable."""

import keras
import numpy as np
from keras import ops

from tfgrow.layers.growable import Axes, Mixing, channels_last_only
from tfgrow.layers.larger_kernel import LargerKernel


class _Conv(LargerKernel, Mixing):
    """What the convolutions share; the Keras class beside it brings the rest."""

    units_attribute = "filters"
    variable_axes = {"kernel": Axes(fan_in=-2, fan_out=-1), "bias": Axes(fan_out=-1)}

    def growth_blocked(self):
        if self.groups != 1:
            return (
                f"layer '{self.name}' is a grouped convolution (groups={self.groups}); only those "
                "of one group or of as many groups as channels (depthwise ones) can grow"
            )
        if self.lora_enabled or getattr(self, "quantization_mode", None):
            return f"layer '{self.name}' has LoRA or quantized weights, which can't be resized"
        return channels_last_only(self)

    @property
    def absorbs_constant(self):
        return self.use_bias

    def linear(self, inputs, kernel, bias=None):
        outputs = self.convolution_op(inputs, kernel)
        return outputs if bias is None else outputs + bias

    def unfold(self, inputs):
        return self._taps(inputs, self.kernel_size, self.convolution_op)

    def linear_enlarged(self, inputs, kernel):
        if self.padding == "causal":
            return self.convolution_op(inputs, kernel)
        return ops.conv(
            inputs,
            kernel,
            strides=list(self.strides),
            padding="same",
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )

    def unfold_enlarged(self, inputs, kernel_size):
        return self._taps(inputs, kernel_size, self.linear_enlarged)

    def _taps(self, inputs, kernel_size, convolve):
        # A convolution of every channel by itself with one-hot kernels copies each tap's input.
        taps = int(np.prod(kernel_size))
        one_hot = np.eye(taps, dtype="float32").reshape((*kernel_size, 1, taps))
        spatial, channels = ops.shape(inputs)[1:-1], inputs.shape[-1]
        to_front = (0, self.rank + 1, *range(1, self.rank + 1))
        each = ops.reshape(ops.transpose(inputs, to_front), (-1, *spatial, 1))
        seen = convolve(each, ops.cast(one_hot, inputs.dtype))
        positions = -1 if None in seen.shape[1:-1] else int(np.prod(seen.shape[1:-1]))
        return ops.reshape(seen, (ops.shape(inputs)[0], channels, positions, taps))


@keras.saving.register_keras_serializable(package="tfgrow")
class Conv1D(_Conv, keras.layers.Conv1D):
    """`keras.layers.Conv1D` whose filters can grow. Same arguments, weights and outputs."""

    stock_class = keras.layers.Conv1D

    def convolution_op(self, inputs, kernel):
        if self.padding != "causal":
            return super().convolution_op(inputs, kernel)
        # Keras pads in `call`, not here: its `convolution_op` doesn't know "causal".
        before = self.dilation_rate[0] * (kernel.shape[0] - 1)
        return ops.conv(
            ops.pad(inputs, [[0, 0], [before, 0], [0, 0]]),
            kernel,
            strides=list(self.strides),
            padding="valid",
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


@keras.saving.register_keras_serializable(package="tfgrow")
class Conv2D(_Conv, keras.layers.Conv2D):
    """`keras.layers.Conv2D` whose filters can grow. Same arguments, weights and outputs.

    Example:

    >>> import numpy as np, tfgrow
    >>> layer = tfgrow.layers.Conv2D(4, 3, padding="same")
    >>> layer(np.ones((1, 8, 8, 3), "float32")).shape
    TensorShape([1, 8, 8, 4])
    """

    stock_class = keras.layers.Conv2D


@keras.saving.register_keras_serializable(package="tfgrow")
class Conv3D(_Conv, keras.layers.Conv3D):
    """`keras.layers.Conv3D` whose filters can grow. Same arguments, weights and outputs."""

    stock_class = keras.layers.Conv3D


CONVOLUTIONS = {3: Conv1D, 4: Conv2D, 5: Conv3D}
"""By the number of axes of what they read."""
