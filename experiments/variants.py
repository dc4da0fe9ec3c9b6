"""The named seed networks of `experiments.models`; imports nothing that takes time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named network: its family and the settings that differ between variants.

    Attributes:
      family: `"vgg"` (pairs of 3x3 convolutions, a max-pool after each pair), `"mlp"` (Flatten and
        Dense layers), `"resnet"` (residual blocks of two 3x3 convolutions) or `"vit"` (pre-norm
        transformer blocks on patches).
      widths: units per layer (vgg, mlp), or inside each block (resnet); per block of a vit two:
        attention heads, and units of the feed-forward layer.
      batch_norm: whether a BatchNormalization follows each mixing layer; a vit has none.
      activation: any Keras activation that acts channel by channel, e.g. `"relu"`, `"gelu"`.
      head: `"gap"` (global average pooling, then the output layer) or `"flatten"` (Flatten, a
        hidden Dense layer as wide as the last convolution, then the output layer), of vgg and
        resnet.
    """

    family: str
    widths: tuple[int, ...]
    batch_norm: bool = True
    activation: str = "relu"
    head: str = "gap"


_CONV_WIDTHS = (4, 4, 8, 8, 16, 16)
_UNEVEN_WIDTHS = (12, 3, 16, 4, 16, 8)
"""A poor guess: every other layer is a bottleneck."""

VARIANTS = {
    "vgg": Variant("vgg", _CONV_WIDTHS),
    "vgg_uneven": Variant("vgg", _UNEVEN_WIDTHS),
    "vgg_no_bn": Variant("vgg", _CONV_WIDTHS, batch_norm=False),
    "vgg_gelu": Variant("vgg", _CONV_WIDTHS, activation="gelu"),
    "vgg_flatten": Variant("vgg", _CONV_WIDTHS, head="flatten"),
    "mlp": Variant("mlp", (16, 16), batch_norm=False),
    "resnet": Variant("resnet", _CONV_WIDTHS),
    "vit": Variant("vit", (4, 16, 4, 16), batch_norm=False, activation="gelu"),
}


def widths_of(name: str, widths: Sequence[int] | None) -> list[int]:
    """Units per layer that are given for a variant, or else its own."""
    return list(widths or VARIANTS[name].widths)
