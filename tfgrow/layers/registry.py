"""How tfgrow sees a layer: the one place that asks for its type."""

from __future__ import annotations

import keras

from tfgrow.layers.activations import is_elementwise, unknown_activation
from tfgrow.layers.attention import GroupQueryAttention, MultiHeadAttention
from tfgrow.layers.batch_normalization import BatchNormalization
from tfgrow.layers.conv import Conv1D, Conv2D, Conv3D
from tfgrow.layers.dense import Dense
from tfgrow.layers.depthwise_conv import DepthwiseConv2D
from tfgrow.layers.growable import Channelwise, Growable, Mixing
from tfgrow.layers.prelu import PReLU
from tfgrow.layers.stateless import Stateless, is_registered, stateless_blocked

GROWABLE_CLASSES = (
    BatchNormalization,
    Conv1D,
    Conv2D,
    Conv3D,
    Dense,
    DepthwiseConv2D,
    GroupQueryAttention,
    MultiHeadAttention,
    PReLU,
)

_BY_STOCK = {growable.stock_class: growable for growable in GROWABLE_CLASSES}


def growable_class(layer: keras.Layer) -> type[Growable] | None:
    """The growable class a stock layer is converted to; None if there is none."""
    return _BY_STOCK.get(type(layer))


def is_ours(layer: keras.Layer) -> bool:
    """Whether a layer is exactly the growable twin of a stock one, not a user's subclass of it."""
    return vars(type(layer)).get("stock_class") is not None


def channelwise_view(layer) -> Channelwise | None:
    """The layer as a channelwise one, or None if it isn't known to be one."""
    if isinstance(layer, Channelwise):
        return layer
    return Stateless(layer) if is_registered(layer) else None


def blocked_reason(layer) -> str | None:
    """Why a mixing or channelwise layer, as configured, can't take part in growth."""
    if isinstance(layer, Growable):
        return layer.growth_blocked()
    return stateless_blocked(layer)


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
