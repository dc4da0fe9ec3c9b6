"""Stock layers that convert takes apart: one layer that can't grow becomes several that can.

One row of the table here is one more such layer. The new layers hold the old one's variables in the
same order, and compute the same.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
from keras import layers

from tfgrow.layers.growable import live_config

_OF_DEPTHWISE = ("kernel_size", "strides", "padding", "dilation_rate", "depth_multiplier")
_OF_POINTWISE = ("name", "filters", "activation", "use_bias", "activity_regularizer",
                 "bias_initializer", "bias_regularizer", "bias_constraint")  # fmt: skip
_OF_WEIGHTS = ("initializer", "regularizer", "constraint")


def _separable(depthwise_class, pointwise_class) -> Callable:
    def expand(layer) -> list[keras.Layer]:
        """A depthwise convolution, and a 1x1 convolution that keeps the layer's name."""
        config = live_config(layer)
        both = {name: config[name] for name in ("trainable", "dtype", "data_format")}
        depthwise, pointwise = (
            {
                name: config[f"{part}_{name}"]
                for name in ("initializer", "regularizer", "constraint")
            }
            for part in ("depthwise", "pointwise")
        )
        first = {name: config[name] for name in _OF_DEPTHWISE}
        first |= {f"depthwise_{name}": value for name, value in depthwise.items()}
        second = {name: config[name] for name in _OF_POINTWISE}
        second |= {f"kernel_{name}": value for name, value in pointwise.items()}
        name = f"{layer.name}_depthwise"
        return [
            depthwise_class.from_config({**both, **first, "use_bias": False, "name": name}),
            pointwise_class.from_config({**both, **second, "kernel_size": 1}),
        ]

    return expand


def _time_distributed(layer) -> list[keras.Layer] | None:
    """A Dense layer treats all leading axes alike: by itself it computes the same."""
    inner = layer.layer
    if type(inner) is not layers.Dense or inner.compute_dtype != layer.compute_dtype:
        return None
    if inner.lora_enabled or getattr(inner, "quantization_mode", None):
        return None
    config = {**live_config(inner), "trainable": layer.trainable and inner.trainable}
    # The wrapper goes past the inner layer's own regularization of its outputs.
    return [
        layers.Dense.from_config({**config, "activity_regularizer": layer.activity_regularizer})
    ]


_EXPANSIONS: dict[type, Callable] = {
    layers.SeparableConv1D: _separable(layers.DepthwiseConv1D, layers.Conv1D),
    layers.SeparableConv2D: _separable(layers.DepthwiseConv2D, layers.Conv2D),
    layers.TimeDistributed: _time_distributed,
}


def expansion(layer: keras.Layer) -> list[keras.Layer] | None:
    """Unbuilt stock layers to call one after the other in a layer's place; None to keep it."""
    expand = _EXPANSIONS.get(type(layer))
    return None if expand is None else expand(layer)
