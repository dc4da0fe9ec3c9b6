"""Dense, growable."""

import math

import keras
from keras import ops

from tfgrow.layers.growable import Axes, Mixing


@keras.saving.register_keras_serializable(package="tfgrow")
class Dense(Mixing, keras.layers.Dense):
    """`keras.layers.Dense` whose units can grow. Same arguments, weights and outputs.

    Example:

    >>> import numpy as np, tfgrow
    >>> layer = tfgrow.layers.Dense(3, activation="relu")
    >>> layer(np.ones((2, 5), "float32")).shape
    TensorShape([2, 3])
    """

    stock_class = keras.layers.Dense
    units_attribute = "units"
    variable_axes = {"kernel": Axes(fan_in=-2, fan_out=-1), "bias": Axes(fan_out=-1)}

    def growth_blocked(self):
        if self.lora_enabled or getattr(self, "quantization_mode", None):
            return f"layer '{self.name}' has LoRA or quantized weights, which can't be resized"
        return None

    @property
    def absorbs_constant(self):
        return self.use_bias

    def linear(self, inputs, kernel, bias=None):
        outputs = ops.matmul(inputs, kernel)
        return outputs if bias is None else outputs + bias

    def unfold(self, inputs):
        between = inputs.shape[1:-1]
        positions = -1 if None in between else math.prod(between)
        flat = ops.reshape(inputs, (ops.shape(inputs)[0], positions, inputs.shape[-1]))
        return ops.transpose(flat, (0, 2, 1))[..., None]
