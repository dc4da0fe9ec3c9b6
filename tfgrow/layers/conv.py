"""Conv1D, Conv2D and Conv3D, growable."""

from typing import Any

import keras
import numpy as np
from keras import ops

from tfgrow.layers.growable import Axes, Enlargement, Mixing, channels_last_only


class _Conv(Mixing):
    """What the convolutions share; the Keras class beside it brings the rest."""

    units_attribute = "filters"
    variable_axes = {"kernel": Axes(fan_in=-2, fan_out=-1), "bias": Axes(fan_out=-1)}

    def growth_blocked(self):
        if self.groups != 1:
            return (
                f"layer '{self.name}' is a grouped convolution (groups={self.groups}); only "
                "groups=1 can grow"
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

    def enlargement(self, input_shape):
        if self.growth_blocked():
            return self.growth_blocked()
        pointwise = all(size == 1 for size in self.kernel_size)
        if self.padding == "valid" and not pointwise:
            return (
                f"layer '{self.name}' has padding='valid', so that a larger kernel would make its "
                "output smaller; build it with padding='same'"
            )
        known = zip(self.kernel_size, input_shape[1:-1], strict=True)
        if all(size is not None and taps >= 2 * size - 1 for taps, size in known):
            return f"the kernel of layer '{self.name}' covers its whole input already"
        larger = tuple(size + 2 for size in self.kernel_size)
        offset = tuple(
            self._offset(axis, size, input_shape[axis + 1]) for axis, size in enumerate(larger)
        )
        if None in offset:
            return (
                f"layer '{self.name}' strides over an input of unknown size {tuple(input_shape)}, "
                "so that where its padding begins is unknown; give the model's input a static shape"
            )
        attributes: dict[str, Any] = {"kernel_size": larger}
        if self.padding == "valid":
            attributes["padding"] = "same"  # which for one tap is the same
        return Enlargement(larger, tuple(at for at in offset if at is not None), attributes)

    def _offset(self, axis: int, larger: int, size: int | None) -> int | None:
        """Where the old kernel begins in one that is padded anew, along one spatial axis."""
        if self.padding == "causal":
            return larger - self.kernel_size[axis]
        stride, dilation = self.strides[axis], self.dilation_rate[axis]
        if stride == 1:
            return (larger - self.kernel_size[axis]) // 2
        if size is None:
            return None

        def before(taps):
            reach = (-(-size // stride) - 1) * stride + (taps - 1) * dilation + 1
            return max(reach - size, 0) // 2

        return (before(larger) - before(self.kernel_size[axis])) // dilation

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
