"""Reads of Keras's private attributes, so that a Keras update breaks in one place.

`surgery/rebuild.py` is the only file that writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import keras
from keras.src import backend
from keras.src.saving import serialization_lib


def graph_of(model: keras.Model) -> Any:
    """The functional graph of a model, or None if it has none (not built, or subclassed)."""
    if isinstance(model, keras.Sequential):
        return getattr(model, "_functional", None) if model.built else None
    return model if hasattr(model, "_nodes_by_depth") else None


def calls_of(functional: Any) -> Iterator[Any]:
    """The calls recorded in a functional graph, producers before consumers, without inputs."""
    for depth in sorted(functional._nodes_by_depth, reverse=True):
        yield from (call for call in functional._nodes_by_depth[depth] if not call.is_input)


def called_by_others(model: keras.Model) -> bool:
    """Whether a model was called on symbolic tensors, and so is a part of another graph."""
    return bool(model._inbound_nodes)


def readers_of(layer: keras.layers.Layer) -> Iterator[keras.Operation]:
    """The layers and operations that read a layer's outputs, in whatever graph."""
    return (call.operation for call in layer._outbound_nodes)


def layers_within(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layer and all layers in it, however deep, in the order it keeps them."""
    return list(layer._flatten_layers())


def optimizer_weights(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The weights that a built optimizer was built on; its slot lists follow this order."""
    return list(optimizer._trainable_variables)


def trusting_configs() -> AbstractContextManager:
    """While it is open, configs may hold lambdas: for configs that come from no file."""
    return serialization_lib.SafeModeScope(safe_mode=False)


def takes_training(operation: Any) -> bool:
    """Whether a layer's call has a `training` argument."""
    return bool(getattr(operation, "_call_has_training_arg", False))


def takes_mask(operation: Any) -> bool:
    """Whether a layer's call has a `mask` argument."""
    return bool(getattr(operation, "_call_has_mask_arg", False))


def mask_of(tensor: Any) -> Any:
    """The mask that a layer has put on a tensor, or None."""
    return backend.get_keras_mask(tensor)


def copy_mask(source: Any, target: Any) -> None:
    """Hands on the mask that a layer before has put on a tensor, unless there is one already."""
    mask = backend.get_keras_mask(source)
    if mask is not None and backend.get_keras_mask(target) is None:
        backend.set_keras_mask(target, mask)


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """What `model.compile` was called with, as the live objects."""
    return dict(model._compile_config.config)
