"""Reads of Keras's private attributes, so that a Keras update breaks in one place.

`surgery/rebuild.py` is the only file that writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras


def graph_of(model: keras.Model) -> Any:
    """The functional graph of a model, or None if it has none (not built, or subclassed)."""
    if isinstance(model, keras.Sequential):
        return getattr(model, "_functional", None) if model.built else None
    return model if hasattr(model, "_nodes_by_depth") else None


def calls_of(functional: Any) -> Iterator[Any]:
    """The calls recorded in a functional graph, producers before consumers, without inputs."""
    for depth in sorted(functional._nodes_by_depth, reverse=True):
        yield from (call for call in functional._nodes_by_depth[depth] if not call.is_input)


def layers_within(model: keras.Model) -> list[keras.layers.Layer]:
    """The model and all layers in it, however deep."""
    return list(model._flatten_layers())


def takes_training(operation: Any) -> bool:
    """Whether a layer's call has a `training` argument."""
    return bool(getattr(operation, "_call_has_training_arg", False))


def takes_mask(operation: Any) -> bool:
    """Whether a layer's call has a `mask` argument."""
    return bool(getattr(operation, "_call_has_mask_arg", False))


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """What `model.compile` was called with, as the live objects."""
    return dict(model._compile_config.config)
