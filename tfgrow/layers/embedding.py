"""Embedding, growable: the one producer that reads no channels."""

import keras
from keras import ops

from tfgrow.layers.growable import Axes, Mixing


@keras.saving.register_keras_serializable(package="tfgrow")
class Embedding(Mixing, keras.layers.Embedding):
    """`keras.layers.Embedding` whose vectors can grow longer. Same arguments, weights, outputs.

    The vocabulary stays as it is.

    Example:

    >>> import numpy as np, tfgrow
    >>> layer = tfgrow.layers.Embedding(10, 3)
    >>> layer(np.array([[1, 2], [9, 0]])).shape
    TensorShape([2, 2, 3])
    """

    stock_class = keras.layers.Embedding
    units_attribute = "output_dim"
    kernel_name = "embeddings"
    variable_axes = {"embeddings": Axes(fan_out=-1)}

    def growth_blocked(self):
        if self.mask_zero:
            return (
                f"layer '{self.name}' hands on a mask (mask_zero=True), and growth follows paths "
                "unmasked: use mask_zero=False, with a vector for padding that is learned"
            )
        if self.lora_enabled or getattr(self, "quantization_mode", None):
            return f"layer '{self.name}' has LoRA or quantized weights, which can't be resized"
        return None

    def linear(self, inputs, embeddings):  # type: ignore[override]  # by the variable's name
        return ops.take(embeddings, ops.cast(inputs, "int32"), axis=0)

    def flops_per_weight(self, output_shape):
        del output_shape
        return 0  # vectors are looked up, nothing is multiplied
