"""deepen: a new layer in a live model, which starts without changing what the model computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import activations, layers

from tfgrow.graph.nodes import Node
from tfgrow.growth import size_of, widths_of
from tfgrow.layers import registry
from tfgrow.layers.activations import is_elementwise
from tfgrow.layers.conv import CONVOLUTIONS
from tfgrow.layers.dense import Dense
from tfgrow.layers.growable import Channelwise, live_config
from tfgrow.surgery.insert import Place, add_branch, free_name, insert_after
from tfgrow.types import GrowthEvent

KINDS = ("auto", "identity", "residual")
KERNEL_SIZE = 3
"""Of the convolutions that are inserted."""


def deepen(model: keras.Model, after: str, kind: str = "auto", seed: int = 0) -> GrowthEvent:
    """Inserts a new layer without changing what the model computes.

    The same Python object gets the layer, inside or outside `fit`, with the optimizer's state, all
    or nothing. On feature vectors it is a `Dense`, on images a 3x3 `Conv2D`, and so on, of as many
    units as there are channels; they are growable. Models that were made of the same symbolic
    tensors before (feature extractors) have to be made anew, and weights that a callback kept from
    before (`EarlyStopping(restore_best_weights=True)`) do not fit any more.

    Args:
      model: a built Functional or Sequential model, usually a growable one.
      after: name of the layer after whose output the new layer comes.
      kind: `"identity"`: the new layer starts as the identity, followed by the activation whose
        values pass there, which must not change them a second time (`relu`, `relu6`, `hard_tanh`,
        or none). `"residual"`: two new layers with the activation between them (`relu` if none is
        known), of which the second starts at zero, are added to what passes; not in a Sequential
        model. `"auto"`: identity where the activation allows it, else residual.
      seed: of the random weights of a residual block's first layer.

    Returns:
      The event, as from `apply`.

    Raises:
      TypeError: the model is subclassed.
      ValueError: nothing can be inserted there; says why.

    Example:

    >>> import keras, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu", name="a"), keras.layers.Dense(2)]))
    >>> tfgrow.deepen(model, after="a").applied
    ({'site': 'a', 'morphism': 'deepen', 'units': [0, 1, 2]},)
    >>> [layer.name for layer in model.layers]
    ['a', 'deepen_a', 'dense']
    """
    started = time.perf_counter()
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}. Found: {kind!r}")
    place = _place(model, after)
    before = size_of(model)
    activation = _passing_activation(place)
    if _is_identity(kind, activation, after):
        inserted = insert_after(model, after, _identity(place, activation))
    else:
        inserted = add_branch(model, after, after, _residual(place, activation, seed))
    size = size_of(model)
    names = {operation.name for operation in inserted}
    new = {name: units for name, units in widths_of(model).items() if name in names}
    units = list(range(place.tensor.shape[-1]))
    return GrowthEvent(
        epoch=0,
        applied=({"site": after, "morphism": "deepen", "units": units},),
        widths={name: (0, units) for name, units in new.items()},
        params_before=before[0],
        params_after=size[0],
        flops_before=before[1],
        flops_after=size[1],
        estimated_change=None,
        measured_change=None,
        loss_before=None,
        alpha=1.0,
        seconds={"surgery": time.perf_counter() - started},
        newborn=new,
    )


# Where.


def _place(model: keras.Model, after: str) -> Place:
    """The place after a layer, if a layer that keeps its channels can stand there."""
    if not isinstance(after, str):
        raise TypeError(f"deepen takes the name of a layer, found {after!r}.")
    place = Place(model, after)
    shape = tuple(place.tensor.shape)
    what = f"Layer '{after}' of model '{model.name}'"
    if isinstance(place.operation, layers.InputLayer):
        raise ValueError(f"{what} is an input. Deepen after a layer that makes channels.")
    if place.is_output:
        raise ValueError(
            f"{what} is an output layer: what comes after it would be the model's output. Deepen "
            "after a layer before it."
        )
    if not keras.backend.is_float_dtype(place.tensor.dtype):
        raise ValueError(f"{what} has an output of dtype {place.tensor.dtype}: expected a float.")
    if not 2 <= len(shape) <= 5 or shape[-1] is None:
        raise ValueError(
            f"{what} has an output of shape {shape}: expected a batch, up to three spatial "
            "dimensions, and a known number of channels."
        )
    for operation in place.upstream() if len(shape) > 2 else ():
        if getattr(operation, "data_format", None) == "channels_first":
            raise ValueError(
                f"{what} follows layer '{operation.name}', which has data_format="
                "'channels_first'; new layers need the channels on the last axis: build it with "
                "data_format='channels_last'."
            )
    return place


def _upstream(place: Place) -> Iterator[Node]:
    """The calls along the first inputs, from the place to the model's input."""
    graph = place.graph
    made_by = {tensor: node for node in graph.nodes for tensor in node.outputs}
    node: Node | None = graph.calls(place.operation)[0]
    while node is not None:
        yield node
        node = made_by.get(node.inputs[0]) if node.inputs else None


def _nearest_mixing(place: Place) -> Any:
    """The Dense or convolution whose channels pass at a place, or None."""
    for node in _upstream(place):
        operation = node.operation
        if isinstance(operation, (layers.Dense, *_CONVOLUTIONS)):
            return operation
        if getattr(operation, "weights", None) and not _is_channelwise(operation):
            return None
    return None


def _is_channelwise(layer: Any) -> bool:
    """Whether a layer is a channelwise one, or would be after `tfgrow.convert`."""
    return issubclass(registry.growable_class(layer) or type(layer), Channelwise)


_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)

# Activations.

_IDEMPOTENT = (activations.linear, activations.relu, activations.relu6, activations.hard_tanh)
_ACTIVATIONS = (layers.ReLU, layers.LeakyReLU, layers.ELU, layers.PReLU)
_KEEP_RANGE = (
    *(layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D),
    *(layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D),
    *(layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D),
    *(layers.GlobalAveragePooling3D, layers.GlobalMaxPooling1D),
    *(layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D),
    *(layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D),
    *(layers.Cropping1D, layers.Cropping2D, layers.Cropping3D),
    *(layers.UpSampling1D, layers.UpSampling2D, layers.UpSampling3D),
    *(layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D),
    *(layers.Dropout, layers.Flatten, layers.Reshape, layers.Identity),
    layers.ActivityRegularization,
)
"""Layers whose values stay in the range of the idempotent activations: convex, with 0 in it."""


def _passing_activation(place: Place) -> Any:
    """The activation whose values pass at a place: a function, a layer, or None if unknown."""
    for node in _upstream(place):
        operation = node.operation
        if type(operation) in _KEEP_RANGE:
            continue
        if isinstance(operation, _ACTIVATIONS):
            return operation
        activation = getattr(operation, "activation", None)
        while isinstance(activation, layers.Activation):
            activation = activation.activation
        return activation
    return None


def _changes_twice(activation: Any) -> bool:
    """Whether an activation may change values that went through it already."""
    if isinstance(activation, layers.ReLU):
        return bool(activation.negative_slope or activation.threshold)
    return activation not in _IDEMPOTENT


def _is_identity(kind: str, activation: Any, after: str) -> bool:
    if kind == "identity" and activation is not None and _changes_twice(activation):
        name = getattr(activation, "name", getattr(activation, "__name__", activation))
        raise ValueError(
            f"The values after layer '{after}' come from the activation '{name}', which would "
            "change them a second time, so that no identity can stand there. Use kind='residual'."
        )
    return kind == "identity" or (kind == "auto" and not _changes_twice(activation))


def _activated(place: Place, activation: Any) -> tuple[Any, Any]:
    """The activation as a layer's argument, and as a layer of its own where it has to be one."""
    if not isinstance(activation, layers.Layer):
        return activation, None
    plain = isinstance(activation, layers.ReLU) and not _changes_twice(activation)
    if plain and activation.max_value is None:
        return activations.relu, None
    kind: Any = registry.growable_class(activation) or type(activation)
    name = free_name(place.model, f"deepen_{place.operation.name}_activation")
    return None, kind.from_config({**live_config(activation), "name": name})


# What.


def _identity(place: Place, activation: Any) -> Callable:
    """A layer that passes its channels on, and the activation, which changes nothing either."""

    def build(tensor):
        argument, own_layer = _activated(place, activation)
        layer = _mixing(place, f"deepen_{place.operation.name}", activation=argument)
        outputs = layer(tensor)
        layer.kernel.assign(_passing_on(layer))
        return outputs if own_layer is None else own_layer(outputs)

    return build


def _residual(place: Place, activation: Any, seed: int) -> Callable:
    """last(activation(first(x))), with `last` at zero."""
    if activation in (None, activations.linear) or (
        not isinstance(activation, layers.Layer) and not is_elementwise(activation)
    ):
        activation = activations.relu

    def build(tensor):
        argument, own_layer = _activated(place, activation)
        name = f"deepen_{place.operation.name}"
        random = keras.initializers.GlorotUniform(seed)
        first = _mixing(place, name, activation=argument, kernel_initializer=random)
        last = _mixing(place, f"{name}_last", kernel_initializer="zeros")
        outputs = first(tensor)
        return last(outputs if own_layer is None else own_layer(outputs))

    return build


def _mixing(place: Place, name: str, **arguments) -> Any:
    """A growable layer from the channels at a place to as many, like the one that made them."""
    nearest = _nearest_mixing(place)
    rank, channels = len(place.tensor.shape), int(place.tensor.shape[-1])
    arguments["name"] = free_name(place.model, name)
    if nearest is not None:
        arguments["kernel_regularizer"] = nearest.kernel_regularizer
        arguments["bias_regularizer"] = nearest.bias_regularizer
    pointwise = isinstance(nearest, layers.Dense) or (nearest is None and rank == 3)
    if rank == 2 or pointwise:
        return Dense(channels, **arguments)
    causal = rank == 3 and nearest.padding == "causal"
    padding = "causal" if causal else "same"
    return CONVOLUTIONS[rank](channels, KERNEL_SIZE, padding=padding, **arguments)


def _passing_on(layer: Any) -> np.ndarray:
    """The kernel with which a layer computes the identity."""
    kernel = np.zeros(layer.kernel.shape, "float32")
    taps = kernel.reshape(-1, *kernel.shape[-2:])  # a view
    present = -1 if getattr(layer, "padding", "") == "causal" else len(taps) // 2
    taps[present] = np.eye(kernel.shape[-1])
    return kernel
