"""Keras operations called on tensors, as in `ops.relu(x + 3.0)`, that treat every element alone.

They are no layers: there is one per call, named by class and module, and it has no weights. One
name here is one more such operation.
"""

from __future__ import annotations

import keras
import numpy as np

from tfgrow._keras import recorded_calls
from tfgrow.layers.growable import Channelwise

_NAMES = {
    "keras.src.ops.nn": """
        Celu Elu Gelu HardShrink HardSigmoid HardSilu HardTanh LeakyRelu LogSigmoid Relu Relu6 Selu
        Sigmoid Silu SoftShrink Softplus Softsign SparsePlus SparseSigmoid Squareplus TanhShrink
        Threshold
    """,
    "keras.src.ops.numpy": """
        Abs Absolute Add Arcsinh Arctan Cbrt Clip Copy Cos Cosh Divide DivideNoNan Exp Exp2 Expm1
        Fabs Fmax Fmin Log Log10 Log1p Log2 Logaddexp Maximum Minimum Multiply Negative Power
        Reciprocal Sign Sin Sinh Sqrt Square Subtract Tan Tanh TrueDivide
    """,
    "keras.src.ops.math": "Erf Erfc Rsqrt",
    "keras.src.ops.core": "Cast",
    "keras.src.activations.activations": "ReLU",
}
_ELEMENTWISE = {(module, name) for module, names in _NAMES.items() for name in names.split()}


def is_elementwise_operation(operation) -> bool:
    """Whether it is a Keras operation that treats every element of a tensor by itself."""
    kind = type(operation)
    return (kind.__module__, kind.__name__) in _ELEMENTWISE


class Elementwise(Channelwise):
    """An operation on one tensor and numbers, as it was called."""

    def __init__(self, operation: keras.Operation):
        self._operation = operation

    def apply_channels(self, inputs, variables):
        del variables
        args, kwargs = recorded_calls(self._operation)[0]
        args, kwargs = keras.tree.map_structure(
            lambda value: inputs if isinstance(value, keras.KerasTensor) else value,
            (args, kwargs),
        )
        return self._operation.call(*args, **kwargs)


def operation_blocked(operation) -> str | None:
    """Why an elementwise operation, as it was called, can't be part of a path; None if it can."""
    calls = recorded_calls(operation)
    if type(operation).__name__ == "Cast" and operation.dtype != "float32":
        return f"operation '{operation.name}' casts to {operation.dtype}, which is not float32"
    settings = [value for name, value in vars(operation).items() if not name.startswith("_")]
    values = keras.tree.flatten((calls[0], settings))
    rank = max(len(value.shape) for value in values if isinstance(value, keras.KerasTensor))
    for value in values:
        shape = np.shape(value) if not hasattr(value, "shape") else tuple(value.shape)
        constant = not isinstance(value, keras.KerasTensor)
        if constant and (np.prod(shape, dtype=np.int64) > 1 or len(shape) > rank):
            return (
                f"operation '{operation.name}' ({type(operation).__name__}) has a constant of "
                f"shape {shape}, which may treat each channel differently; use a number, or a "
                "layer with weights, such as BatchNormalization"
            )
    if len(calls) != 1:
        return f"operation '{operation.name}' is part of {len(calls)} models; convert them apart"
    return None
