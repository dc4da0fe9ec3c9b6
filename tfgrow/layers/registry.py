"""How tfgrow sees a layer: the one place that asks for its type."""

from __future__ import annotations

import keras

from tfgrow.layers.activations import is_elementwise, unknown_activation
from tfgrow.layers.attention import GroupQueryAttention, MultiHeadAttention
from tfgrow.layers.batch_normalization import BatchNormalization
from tfgrow.layers.conv import Conv1D, Conv2D, Conv3D
from tfgrow.layers.conv_transpose import Conv1DTranspose, Conv2DTranspose, Conv3DTranspose
from tfgrow.layers.dense import Dense
from tfgrow.layers.depthwise_conv import (
    ChannelwiseConv1D,
    ChannelwiseConv2D,
    DepthwiseConv1D,
    DepthwiseConv2D,
)
from tfgrow.layers.einsum_dense import EinsumDense
from tfgrow.layers.embedding import Embedding
from tfgrow.layers.group_normalization import GroupNormalization
from tfgrow.layers.growable import Channelwise, Growable, Mixing
from tfgrow.layers.layer_normalization import LayerNormalization, RMSNormalization
from tfgrow.layers.layer_scale import LayerScale
from tfgrow.layers.prelu import PReLU
from tfgrow.layers.stateless import stateless_blocked, stateless_view

GROWABLE_CLASSES = (
    BatchNormalization,
    ChannelwiseConv1D,  # before Conv1D: the first that takes a layer is its twin
    ChannelwiseConv2D,
    Conv1D,
    Conv1DTranspose,
    Conv2D,
    Conv2DTranspose,
    Conv3D,
    Conv3DTranspose,
    Dense,
    DepthwiseConv1D,
    DepthwiseConv2D,
    EinsumDense,
    Embedding,
    GroupNormalization,
    GroupQueryAttention,
    LayerNormalization,
    LayerScale,
    MultiHeadAttention,
    PReLU,
    RMSNormalization,
)


def growable_class(layer: keras.Layer) -> type[Growable] | None:
    """The growable class a stock layer is converted to; None if there is none."""
    twins = (twin for twin in GROWABLE_CLASSES if twin.stock_class is type(layer))
    return next((twin for twin in twins if twin.takes(layer)), None)


def is_ours(layer: keras.Layer) -> bool:
    """Whether a layer is exactly the growable twin of a stock one, not a user's subclass of it."""
    return vars(type(layer)).get("stock_class") is not None


def channelwise_view(layer) -> Channelwise | None:
    """The layer as a channelwise one, or None if it isn't known to be one."""
    return layer if isinstance(layer, Channelwise) else stateless_view(layer)


def blocked_reason(layer) -> str | None:
    """Why a mixing or channelwise layer, as configured, can't take part in growth."""
    if isinstance(layer, Growable):
        return layer.growth_blocked()
    return stateless_blocked(layer)


def consumer_blocked(layer: Mixing) -> str | None:
    """Why a mixing layer can't be a consumer."""
    axes = layer.variable_axes.get(layer.kernel_name)
    if axes is not None and axes.fan_in is None:
        return (
            f"layer '{layer.name}' ({type(layer).__name__}) has no axis of input channels: "
            "it reads whole numbers"
        )
    return layer.growth_blocked()


def producer_blocked(layer: Mixing) -> str | None:
    """Why a mixing layer can't be a producer (its own activation must be elementwise too)."""
    reason = layer.growth_blocked()
    if reason is None and not is_elementwise(getattr(layer, "activation", None)):
        return unknown_activation(layer)
    return reason


class OwnActivation(Channelwise):
    """A producer's `activation=` argument, seen as the first step of its path."""

    def __init__(self, producer: Mixing):
        self._producer = producer

    def apply_channels(self, inputs, variables):
        del variables
        return self._producer.activate(inputs)
