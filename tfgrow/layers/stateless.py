"""Stock layers and operations that treat every channel by itself and have no variables.

They are used as they are. One line here registers one more such layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import keras
import numpy as np
from keras import activations, layers

from tfgrow._keras import takes_training
from tfgrow.layers.activations import is_elementwise, unknown_activation
from tfgrow.layers.growable import Channelwise, channels_last_only
from tfgrow.layers.operations import Elementwise, is_elementwise_operation, operation_blocked
from tfgrow.layers.reshape import Reshaped, merged_positions, permute_blocked, reshape_blocked
from tfgrow.types import ChannelMap


def _always(layer) -> str | None:
    del layer
    return None


def _elementwise(layer) -> str | None:
    return None if is_elementwise(layer.activation) else unknown_activation(layer)


def _any_channels(layer) -> str | None:
    shape = getattr(layer, "noise_shape", None)
    if shape is None or tuple(shape)[-1] in (None, 1):
        return None
    return (
        f"layer '{layer.name}' ({type(layer).__name__}) has noise_shape={tuple(shape)}, for "
        f"{shape[-1]} channels and no others; put None in their place"
    )


def _one_scale(layer) -> str | None:
    if np.ndim(layer.scale) == 0 and np.ndim(layer.offset) == 0:
        return None
    return f"layer '{layer.name}' rescales each channel by its own constant"


def _spatial_only(layer) -> str | None:
    if layer.__class__.__name__.endswith("1D"):
        return None  # 1-D padding and cropping have no data_format: they act on the middle axis
    return channels_last_only(layer)


class Stateless(Channelwise):
    """A registered stock layer seen as a channelwise one."""

    def __init__(self, layer: keras.Layer):
        self._layer = layer

    def apply_channels(self, inputs, variables):
        del variables
        inference = {"training": False} if takes_training(self._layer) else {}
        return self._layer.call(inputs, **inference)


class _Flattened(Stateless):
    """Flatten: the channels of all positions behind one another."""

    def channel_map(self, incoming: ChannelMap, input_shape) -> ChannelMap:
        return merged_positions(incoming, int(np.prod(input_shape[1:-1], dtype=np.int64)))


_REGISTRY: dict[type, tuple[Callable, Callable]] = {}


def register_channelwise(
    layer_class: type,
    blocked: Callable = _always,
    view: Callable[[keras.Layer], Channelwise] | None = None,
) -> None:
    """Declares a variable-free layer to be channelwise in inference mode.

    Args:
      layer_class: the exact class (not its subclasses).
      blocked: function of the layer, giving the reason it isn't, or None.
      view: function of the layer, giving it as a `Channelwise`; by default channels are on the
        same places of the last axis before and after it, and it is called in inference mode.
    """
    _REGISTRY[layer_class] = (blocked, view or Stateless)


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
# Those that draw the same for all channels. In inference mode, in which growth is decided, they
# only hand on what they read. (RandomCrop doesn't crop then, and so makes other shapes.)
_RANDOM = ("Brightness Contrast ElasticTransform Erasing Flip GaussianBlur Perspective "
           "Rotation Shear Translation Zoom").split()  # fmt: skip


def _known(pattern: str, *choices: Iterable) -> list[type]:
    """The layer classes of such names that this version of Keras has."""
    names = [pattern.format(*choice) for choice in itertools.product(*choices)]
    return [getattr(layers, name) for name in names if hasattr(layers, name)]


for _class in (layers.ReLU, layers.LeakyReLU, layers.ELU):
    register_channelwise(_class)
for _class in _IDENTITIES:
    register_channelwise(_class, _any_channels)
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
    *_known("Adaptive{}Pooling{}D", ("Average", "Max"), (1, 2, 3)),
    *_known("Random{}", _RANDOM),
    layers.CenterCrop,
    layers.Resizing,
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
register_channelwise(layers.RepeatVector)


def changes_nothing(operation) -> bool:
    """Whether a layer only hands on what it reads, in inference mode."""
    if type(operation) is layers.Activation:
        return operation.activation is activations.linear
    if type(operation) is layers.Reshape:
        return tuple(operation.output.shape) == tuple(operation.input.shape)
    return type(operation) in _IDENTITIES


register_channelwise(layers.Flatten, channels_last_only, _Flattened)
register_channelwise(layers.Reshape, reshape_blocked, Reshaped)
register_channelwise(layers.Permute, permute_blocked)


def stateless_view(operation) -> Channelwise | None:
    """A stock layer or an operation as a channelwise one, or None if it isn't known to be one."""
    if type(operation) in _REGISTRY:
        return _REGISTRY[type(operation)][1](operation)
    return Elementwise(operation) if is_elementwise_operation(operation) else None


def stateless_blocked(operation) -> str | None:
    """Why what has a `stateless_view` isn't channelwise here; None if it is."""
    if type(operation) in _REGISTRY:
        return _REGISTRY[type(operation)][0](operation)
    return operation_blocked(operation)
