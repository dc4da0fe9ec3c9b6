"""Stock layers that treat every channel by itself and have no variables: used as they are.

One line here registers one more such layer.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from keras import activations, layers

from tfgrow.layers.activations import is_elementwise, unknown_activation
from tfgrow.layers.growable import Channelwise, channels_last_only
from tfgrow.types import ChannelMap


def _always(layer) -> str | None:
    del layer
    return None


def _elementwise(layer) -> str | None:
    return None if is_elementwise(layer.activation) else unknown_activation(layer)


def _one_scale(layer) -> str | None:
    if np.ndim(layer.scale) == 0 and np.ndim(layer.offset) == 0:
        return None
    return f"layer '{layer.name}' rescales each channel by its own constant"


def _spatial_only(layer) -> str | None:
    if layer.__class__.__name__.endswith("1D"):
        return None  # 1-D padding and cropping have no data_format: they act on the middle axis
    return channels_last_only(layer)


_REGISTRY: dict[type, Callable] = {}


def register_channelwise(layer_class: type, blocked: Callable = _always) -> None:
    """Declares a variable-free layer to be channelwise in inference mode.

    Args:
      layer_class: the exact class (not its subclasses).
      blocked: function of the layer, giving the reason it isn't, or None.
    """
    _REGISTRY[layer_class] = blocked


_IDENTITIES = (
    layers.Dropout,
    layers.AlphaDropout,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.ActivityRegularization,
    layers.Identity,
)
for _class in (layers.ReLU, layers.LeakyReLU, layers.ELU, *_IDENTITIES):
    register_channelwise(_class)
for _class in (
    layers.MaxPooling1D,
    layers.MaxPooling2D,
    layers.MaxPooling3D,
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.GlobalMaxPooling3D,
    layers.Flatten,
):
    register_channelwise(_class, channels_last_only)
for _class in (
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
):
    register_channelwise(_class, _spatial_only)
register_channelwise(layers.Activation, _elementwise)
register_channelwise(layers.Rescaling, _one_scale)


def changes_nothing(operation) -> bool:
    """Whether a layer only hands on what it reads, in inference mode."""
    if type(operation) is layers.Activation:
        return operation.activation is activations.linear
    if type(operation) is layers.Reshape:
        return tuple(operation.output.shape) == tuple(operation.input.shape)
    return type(operation) in _IDENTITIES


class Stateless(Channelwise):
    """A registered stock layer seen as a channelwise one."""

    def __init__(self, layer: keras.Layer):
        self._layer = layer

    def channel_map(self, incoming: ChannelMap, input_shape) -> ChannelMap:
        if not isinstance(self._layer, layers.Flatten):
            return incoming
        positions = int(np.prod(input_shape[1:-1], dtype=np.int64))
        offsets = np.arange(positions)[None, :, None] * incoming.size
        index = (incoming.index[:, None, :] + offsets).reshape(incoming.units, -1)
        return ChannelMap(index, incoming.size * positions)

    def apply_channels(self, inputs, variables):
        del variables
        return self._layer.call(inputs)  # `training` defaults to False in all registered layers


def stateless_blocked(layer) -> str | None:
    """Why a stock layer isn't channelwise here; None if it is. KeyError if it is unknown."""
    return _REGISTRY[type(layer)](layer)


def is_registered(layer) -> bool:
    """Whether `register_channelwise` knows the layer's exact class."""
    return type(layer) in _REGISTRY
