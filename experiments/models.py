"""Seed networks: small stock Keras models to grow from.

Every network takes images with values 0..255 (input `image`) and rescales them itself. Mixing
layers are numbered in order (`conv1`, `bn1`, `act1`, ...), the last one is `logits`, or
`probabilities` if it ends in a softmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from experiments._flags import are_whole
from experiments.variants import VARIANTS, Variant

SMALLEST_TO_POOL = 6
"""Maps smaller than this are not halved any more, so that small images keep 3x3 positions."""

BATCH_NORM_MOMENTUM = 0.9
"""The moving statistics remember about 10 steps. With Keras's 0.99 they remember 100, several
epochs of a small dataset: validation, the estimates and the guard, which all run in inference mode,
would judge a network whose statistics are those of earlier weights."""

RESNET_STREAMS = (8, 12, 16)
"""Channels of the residual stream per stage at the start; widths are those inside the blocks."""

SHIFT = (0.125, 0.125)
"""Training images are shifted by at most this share of their height and width: 4 pixels of 32."""

VIT_STREAM = 32
"""Channels of the transformer's residual stream: fixed, heads and feed-forward layers grow."""

VIT_KEY_DIM = 8
"""Channels per head."""

VIT_ROWS = 8
"""About so many rows of patches are cut from an image, of at least 2x2 pixels each."""


def parse_widths(texts: Sequence[str]) -> list[int]:
    """Units per layer as a flag gives them.

    Raises:
      ValueError: one of them is no whole number of at least 1.
    """
    if not are_whole(texts):
        raise ValueError(f"--widths takes whole numbers >= 1 such as 4,4,8,8. Found: {texts}")
    return [int(text) for text in texts]


def variants() -> tuple[str, ...]:
    """Names that `build` knows."""
    return tuple(VARIANTS)


def build(
    name: str,
    input_shape: Sequence[int],
    num_classes: int,
    widths: Sequence[int] | None = None,
    seed: int = 0,
    *,
    batch_norm: bool | None = None,
    activation: str | None = None,
    head: str | None = None,
    softmax: bool = True,
    augment: bool = False,
) -> keras.Model:
    """Builds an uncompiled seed network of stock Keras layers.

    Args:
      name: one of `variants()`.
      input_shape: `(height, width, channels)` of an image.
      num_classes: units of the output layer.
      widths: units per layer, or per residual block, or heads and units per transformer block;
        the variant's by default.
      seed: seed of the initial weights (equal seeds give equal weights) and of the augmentation.
      batch_norm: overrides the variant's, see `Variant`.
      activation: overrides the variant's.
      head: overrides the variant's.
      softmax: output probabilities; else logits.
      augment: shift (and, for colour images, mirror) the training images inside the model.

    Raises:
      ValueError: if a name, width, shape or setting is not one of those above.

    Example:

    >>> from experiments import models
    >>> models.build("vgg", (32, 32, 3), 10).count_params()
    4966
    """
    variant = _variant(name, widths, batch_norm, activation, head)
    shape = tuple(int(size) for size in input_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"Expected input_shape (height, width, channels), found {input_shape}.")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, found {num_classes}.")
    layers = _Layers(variant, seed)
    image = keras.Input(shape, name="image")
    x = keras.layers.Rescaling(1 / 255, name="rescale")(image)
    x = layers.augmented(x) if augment else x
    x = _FAMILIES[variant.family](layers, x)
    return keras.Model(image, layers.output(x, num_classes, softmax), name=name)


def _variant(name: str, widths: Sequence[int] | None, *settings: Any) -> Variant:
    if name not in VARIANTS:
        raise ValueError(f"Unknown model {name!r}; expected one of {', '.join(VARIANTS)}.")
    names = ("batch_norm", "activation", "head")
    given = {key: value for key, value in zip(names, settings, strict=True) if value is not None}
    if widths is not None:
        given["widths"] = tuple(int(width) for width in widths)
    variant = dataclasses.replace(VARIANTS[name], **given)
    if not variant.widths or min(variant.widths) < 1:
        raise ValueError(f"Model {name!r} needs positive widths, found {variant.widths}.")
    if variant.family == "vit" and len(variant.widths) % 2:
        raise ValueError(
            f"Model {name!r} takes two widths per block, heads and feed-forward units, such as "
            f"4,16,4,16. Found: {variant.widths}."
        )
    if variant.head not in ("gap", "flatten"):
        raise ValueError(f"Unknown head {variant.head!r}; expected 'gap' or 'flatten'.")
    return variant


class _Layers:
    """Makes the named, seeded layers of one network."""

    def __init__(self, variant: Variant, seed: int):
        self.variant = variant
        self._rng = np.random.default_rng(seed)

    def conv(self, x: Any, units: int, name: str, size: int = 3, strides: int = 1) -> Any:
        return keras.layers.Conv2D(
            units,
            size,
            strides=strides,
            padding="same",
            use_bias=not self.variant.batch_norm,
            kernel_initializer=keras.initializers.HeNormal(self._seed()),
            name=name,
        )(x)

    def dense(self, x: Any, units: int, name: str, batch_norm: bool) -> Any:
        return keras.layers.Dense(
            units,
            use_bias=not batch_norm,
            kernel_initializer=keras.initializers.HeNormal(self._seed()),
            name=name,
        )(x)

    def attention(self, x: Any, heads: int, name: str) -> Any:
        layer = keras.layers.MultiHeadAttention(heads, VIT_KEY_DIM, name=name)
        made = layer(x, x)
        # One seeded initializer would start queries, keys and values as the same projection.
        for weight in layer.trainable_weights:
            if weight.name == "kernel":
                weight.assign(keras.initializers.GlorotUniform(self._seed())(weight.shape))
        return made

    def positions(self, x: Any, name: str) -> Any:
        """A learned vector for each token of `[N, tokens, channels]`."""
        numbers = keras.ops.cumsum(keras.ops.ones_like(x[:, :, 0], dtype="int32"), axis=1) - 1
        # As large as the patches: of the usual 0.02 little is heard in a short training.
        start = keras.initializers.RandomNormal(stddev=0.3, seed=self._seed())
        return keras.layers.Embedding(*x.shape[1:], start, name=name)(numbers)

    def norm(self, x: Any, name: str) -> Any:
        if not self.variant.batch_norm:
            return x
        return keras.layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM, name=name)(x)

    def activate(self, x: Any, name: str) -> Any:
        return keras.layers.Activation(self.variant.activation, name=name)(x)

    def augmented(self, x: Any) -> Any:
        # Mirrored digits and letters mean something else; mirrored photographs do not.
        if x.shape[-1] == 3:
            x = keras.layers.RandomFlip("horizontal", seed=self._seed(), name="flip")(x)
        # By whole pixels: between them, training images would be blurred, and others not.
        shift = keras.layers.RandomTranslation(
            *SHIFT, fill_mode="constant", interpolation="nearest", seed=self._seed(), name="shift"
        )
        return shift(x)

    def head(self, x: Any) -> Any:
        if self.variant.head == "gap":
            return keras.layers.GlobalAveragePooling2D(name="gap")(x)
        x = keras.layers.Flatten(name="flatten")(x)
        x = self.dense(x, self.variant.widths[-1], "fc1", batch_norm=False)
        return self.activate(x, "fc1_act")

    def output(self, x: Any, units: int, softmax: bool) -> Any:
        # Under mixed precision probabilities must still be float32, or small ones underflow.
        mixed = keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
        return keras.layers.Dense(
            units,
            activation="softmax" if softmax else None,
            kernel_initializer=keras.initializers.GlorotUniform(self._seed()),
            dtype="float32" if mixed else None,
            name="probabilities" if softmax else "logits",
        )(x)

    def _seed(self) -> int:
        return int(self._rng.integers(2**31))


def _vgg(layers: _Layers, x: Any) -> Any:
    for number, units in enumerate(layers.variant.widths, start=1):
        x = layers.conv(x, units, f"conv{number}")
        x = layers.activate(layers.norm(x, f"bn{number}"), f"act{number}")
        if number % 2 == 0 and _can_halve(x):
            x = keras.layers.MaxPooling2D(name=f"pool{number // 2}")(x)
    return layers.head(x)


def _mlp(layers: _Layers, x: Any) -> Any:
    x = keras.layers.Flatten(name="flatten")(x)
    for number, units in enumerate(layers.variant.widths, start=1):
        x = layers.dense(x, units, f"dense{number}", layers.variant.batch_norm)
        x = layers.activate(layers.norm(x, f"bn{number}"), f"act{number}")
    return x


def _resnet(layers: _Layers, x: Any) -> Any:
    x = layers.conv(x, RESNET_STREAMS[0], "stem_conv")
    x = layers.activate(layers.norm(x, "stem_bn"), "stem_act")
    stages = np.array_split(np.asarray(layers.variant.widths), len(RESNET_STREAMS))
    number = 0
    for stream, inner_widths in zip(RESNET_STREAMS, stages, strict=True):
        for inner in inner_widths:
            number += 1
            x = _block(layers, x, int(inner), stream, f"block{number}")
    return layers.head(x)


def _block(layers: _Layers, x: Any, inner: int, stream: int, name: str) -> Any:
    """Two convolutions beside a shortcut; the first block of a stage also halves the map."""
    shortcut, strides = x, 1
    if x.shape[-1] != stream:
        strides = 2 if _can_halve(x) else 1
        shortcut = layers.conv(x, stream, f"{name}_shortcut", size=1, strides=strides)
        shortcut = layers.norm(shortcut, f"{name}_shortcut_bn")
    y = layers.conv(x, inner, f"{name}_conv1", strides=strides)
    y = layers.activate(layers.norm(y, f"{name}_bn1"), f"{name}_act1")
    y = layers.norm(layers.conv(y, stream, f"{name}_conv2"), f"{name}_bn2")
    return layers.activate(keras.layers.Add(name=f"{name}_add")([y, shortcut]), f"{name}_act2")


def _vit(layers: _Layers, x: Any) -> Any:
    size = max(2, min(x.shape[1:3]) // VIT_ROWS)
    x = layers.conv(x, VIT_STREAM, "patches", size, strides=size)
    x = keras.layers.Reshape((-1, VIT_STREAM), name="tokens")(x)
    x = keras.layers.Add(name="placed")([x, layers.positions(x, "positions")])
    widths = iter(layers.variant.widths)
    for number, (heads, units) in enumerate(zip(widths, widths, strict=True), start=1):
        y = keras.layers.LayerNormalization(name=f"attention_norm{number}")(x)
        y = layers.attention(y, heads, f"attention{number}")
        x = keras.layers.Add(name=f"attention_add{number}")([x, y])
        y = keras.layers.LayerNormalization(name=f"feed_forward_norm{number}")(x)
        y = layers.dense(y, units, f"feed_forward{number}", batch_norm=False)
        y = layers.activate(y, f"act{number}")
        y = layers.dense(y, VIT_STREAM, f"back{number}", batch_norm=False)
        x = keras.layers.Add(name=f"feed_forward_add{number}")([x, y])
    x = keras.layers.LayerNormalization(name="norm")(x)
    return keras.layers.GlobalAveragePooling1D(name="gap")(x)


def _can_halve(x: Any) -> bool:
    return min(x.shape[1:3]) >= SMALLEST_TO_POOL


_FAMILIES = {"vgg": _vgg, "mlp": _mlp, "resnet": _resnet, "vit": _vit}
