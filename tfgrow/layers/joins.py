"""Layers and operations that make one tensor of several: they tie channels or put them in a row.

One line here registers one more such layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tfgrow.types import ChannelMap


class Join:
    """What tfgrow asks of a layer that reads several tensors, in inference mode.

    Attributes:
      ties: whether channels at the same position become one: they widen together. Otherwise they
        lie one behind the other.
    """

    ties: bool

    def __init__(self, operation):
        self.operation = operation

    def combine(self, args: tuple, kwargs: Mapping[str, Any]):
        """The layer on its recorded arguments, with tensors of any number of channels."""
        raise NotImplementedError


class Elementwise(Join):
    """Add, Multiply and the like; a tensor of one channel is spread over those of the others."""

    ties = True

    def combine(self, args, kwargs):
        return self.operation.call(*args, **kwargs)


class AlongAnotherAxis(Elementwise):
    """Concatenation of positions: the channels stay what they are."""


class Concatenation(Join):
    """Concatenation of channels. Inputs that have none of them are None."""

    ties = False

    def combine(self, args, kwargs):
        del kwargs
        return ops.concatenate([part for part in args[0] if part is not None], axis=-1)


def in_a_row(parts: Sequence[tuple[int, ChannelMap | None]]) -> ChannelMap | None:
    """Where channels lie behind a concatenation, given its inputs' sizes and where they lie there.

    Args:
      parts: per input, the length of its last axis, and where the channels lie on it if at all.
    """
    start, found = 0, []
    for size, channels in parts:
        if channels is not None:
            found.append(channels.index + start)
        start += size
    return ChannelMap(np.concatenate(found, axis=1), start) if found else None


def _elementwise(operation, output) -> Join:
    del output
    return Elementwise(operation)


def _concatenation(operation, output) -> Join:
    rank = len(output.shape)
    last = operation.axis in (-1, rank - 1)
    return (Concatenation if last else AlongAnotherAxis)(operation)


_BY_CLASS: dict[type, Callable[[Any, Any], Join]] = {
    layers.Add: _elementwise,
    layers.Subtract: _elementwise,
    layers.Multiply: _elementwise,
    layers.Average: _elementwise,
    layers.Maximum: _elementwise,
    layers.Minimum: _elementwise,
    layers.Concatenate: _concatenation,
}
# Keras has no public name for the classes of its operations (`x + y`, `ops.concatenate`).
_BY_NAME: dict[str, Callable[[Any, Any], Join]] = {
    "Add": _elementwise,
    "Subtract": _elementwise,
    "Multiply": _elementwise,
    "Divide": _elementwise,
    "TrueDivide": _elementwise,
    "Maximum": _elementwise,
    "Minimum": _elementwise,
    "Concatenate": _concatenation,
    # of keras.applications' InceptionResNetV2: x + scale * y
    "CustomScaleLayer": _elementwise,
}


def register_join(layer_class: type) -> None:
    """Declares that a layer computes every element from those at its place in its inputs.

    Args:
      layer_class: the exact class (not its subclasses) of a layer without weights, like
        `keras.layers.Add`.

    Example:

    >>> import keras, tfgrow
    >>> class Difference(keras.layers.Layer):
    ...     def call(self, inputs):
    ...         return abs(inputs[0] - inputs[1])
    >>> tfgrow.layers.register_join(Difference)
    """
    _BY_CLASS[layer_class] = _elementwise


def join_view(operation, output=None) -> Join | None:
    """A layer or operation as a join, or None if it isn't known to be one.

    Args:
      operation: which.
      output: the symbolic tensor it makes, where it is called several times; its first by default.
    """
    kind = type(operation)
    make = _BY_CLASS.get(kind)
    if make is None and kind.__module__.startswith("keras.src."):
        own = isinstance(operation, keras.layers.Layer) and kind.__name__ != "CustomScaleLayer"
        make = None if own else _BY_NAME.get(kind.__name__)
    return None if make is None else make(operation, operation.output if output is None else output)
