"""EinsumDense, growable where it is a Dense layer in other words."""

import re

import keras
from keras import ops

from tfgrow.layers.dense import Dense
from tfgrow.layers.growable import Axes, Mixing

_LAST_BY_NEW = re.compile(
    r"(?P<others>(?:\.\.\.)?[a-zA-Z]*)(?P<old>[a-zA-Z]),(?P=old)(?P<new>[a-zA-Z])"
    r"->(?P=others)(?P=new)"
)
"""The last axis contracted, a new one in its place: `abc,cd->abd` or `...x,xy->...y`."""


@keras.saving.register_keras_serializable(package="tfgrow")
class EinsumDense(Mixing, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` whose last axis can grow, for equations like `abc,cd->abd`.

    Example:

    >>> import numpy as np, tfgrow
    >>> layer = tfgrow.layers.EinsumDense("...x,xy->...y", output_shape=3, bias_axes="y")
    >>> layer(np.ones((2, 4, 5), "float32")).shape
    TensorShape([2, 4, 3])
    """

    stock_class = keras.layers.EinsumDense
    variable_axes = {"kernel": Axes(fan_in=-2, fan_out=-1), "bias": Axes(fan_out=-1)}

    def growth_blocked(self):
        found = _LAST_BY_NEW.fullmatch(self.equation.replace(" ", ""))
        if found is None or found["new"] in found["others"] + found["old"]:
            return (
                f"layer '{self.name}' has the equation '{self.equation}'; only those that contract "
                "the last axis alone and put a new one in its place can grow, such as 'abc,cd->abd'"
            )
        if self.bias_axes not in (None, "", found["new"]):
            return (
                f"layer '{self.name}' ('{self.equation}') has bias_axes='{self.bias_axes}'; only a "
                f"bias along the new axis can grow: bias_axes='{found['new']}'"
            )
        if self.lora_enabled or getattr(self, "quantization_mode", None):
            return f"layer '{self.name}' has LoRA or quantized weights, which can't be resized"
        return None

    @property
    def growth_units(self):
        return int(self.partial_output_shape[-1])

    def width_attributes(self, units):
        return {"partial_output_shape": (*self.partial_output_shape[:-1], units)}

    @property
    def absorbs_constant(self):
        return self.bias is not None

    def linear(self, inputs, kernel, bias=None):
        outputs = ops.einsum(self.equation, inputs, kernel)
        return outputs if bias is None else outputs + bias

    unfold = Dense.unfold
