"""Stock layers that no site's channels can pass, each with the reason and what one can do.

One row here is one more such layer. A reason goes on from "layer 'x' (Kind), ".
"""

from __future__ import annotations

import keras
from keras import layers

_REASONS: dict[type, str] = {}


def register_blocked(layer_class: type, reason: str) -> None:
    """Declares why channels can't grow through, into or out of a kind of layers.

    Args:
      layer_class: the class; its subclasses are meant too, unless they have a reason of their own.
      reason: goes on from "layer 'x' (Kind), ": why, and what the user can do.

    Example:

    >>> import keras, tfgrow
    >>> class Whiten(keras.layers.Layer):
    ...     pass
    >>> tfgrow.layers.register_blocked(Whiten, "which decorrelates channels: leave them as many")
    >>> tfgrow.layers.unsupported.unsupported(Whiten())
    'which decorrelates channels: leave them as many'
    """
    _REASONS[layer_class] = reason


def unsupported(operation) -> str | None:
    """Why a layer is known not to let channels grow; None if nothing is known."""
    for kind in type(operation).__mro__:
        if kind in _REASONS:
            return _REASONS[kind]
    return None


_SPARE = (
    "To let the layers before it grow, put a Dense layer or a 1x1 convolution between: that one's "
    "width then stays"
)

register_blocked(
    layers.UnitNormalization,
    "which normalises over the channels, so that a new unit would change what the others hand "
    f"on; use BatchNormalization instead. {_SPARE}",
)
for _class in (layers.LSTM, layers.GRU, layers.SimpleRNN, layers.RNN, layers.Bidirectional,
               layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D):  # fmt: skip
    register_blocked(
        _class,
        "which is recurrent: its gates read all channels and its own state, by weights that tfgrow "
        f"doesn't know how to widen. {_SPARE}",
    )
for _class in (layers.MultiHeadAttention, layers.GroupQueryAttention):
    register_blocked(
        _class,
        "which projects all channels to heads and back: its model width can't grow. Widths inside "
        f"a block, such as that of its Dense layers, can. {_SPARE}",
    )
for _class in (layers.Attention, layers.AdditiveAttention):
    register_blocked(_class, f"which compares positions by all of their channels at once. {_SPARE}")
register_blocked(
    layers.SpectralNormalization,
    "which divides a layer's weights by their largest singular value, to which every unit adds; "
    "call the inner layer by itself",
)
register_blocked(
    layers.TimeDistributed,
    "of which only TimeDistributed(Dense) is taken apart by tfgrow.convert; most layers treat "
    "leading axes alike by themselves: call the inner layer without TimeDistributed, or reshape "
    "time into the batch",
)
register_blocked(
    layers.Masking,
    "which hands on a mask, and growth follows paths unmasked; mask the model's input before it, "
    "or weight the samples",
)
register_blocked(
    layers.Softmax,
    "which compares channels with one another, so that a new unit would change what the others "
    f"hand on; use an elementwise activation, such as sigmoid. {_SPARE}",
)
register_blocked(
    layers.Normalization,
    "which rescales each channel by constants of its own; use BatchNormalization, or normalise "
    "the model's inputs",
)
register_blocked(
    layers.Lambda,
    "whose function tfgrow can't see into; write it as a layer of your own and, if it treats every "
    "channel by itself, declare that with tfgrow.layers.register_channelwise",
)
register_blocked(
    keras.Model,
    "a nested model; tfgrow.convert(model) inlines nested Functional and Sequential models",
)
