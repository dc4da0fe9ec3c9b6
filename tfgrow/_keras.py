"""Reads of Keras's private attributes, so that a Keras update breaks in one place.

`surgery/rebuild.py` and `surgery/shapes.py` are the only files that write them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import keras
from keras.src import backend
from keras.src.applications.convnext import LayerScale as LayerScale
from keras.src.saving import serialization_lib

SET_BY_TRAINING = {
    "_compile_config", "_compiled_trainable_state", "_eval_epoch_iterator", "history", "optimizer",
    "stop_evaluating", "stop_predicting", "stop_training",
}  # fmt: skip
"""Attributes that a model has only after `compile`, `fit`, `evaluate` or `predict`."""


def graph_of(model: Any) -> Any:
    """The functional graph of a model, or None: not built, subclassed, or no model at all."""
    if isinstance(model, keras.Sequential):
        return getattr(model, "_functional", None) if model.built else None
    return model if hasattr(model, "_nodes_by_depth") else None


def nodes_of(functional: Any) -> list[Any]:
    """The calls recorded in a functional graph, producers before consumers, inputs among them."""
    by_depth = functional._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]


def calls_of(functional: Any) -> Iterator[Any]:
    """The calls recorded in a functional graph, producers before consumers, without inputs."""
    return (node for node in nodes_of(functional) if not node.is_input)


def operations_within(model: Any) -> Iterator[keras.Operation]:
    """What a model's graph calls, and what the models in it call, however deep."""
    graph = graph_of(model)
    for operation in graph.operations if graph is not None else ():
        yield operation
        yield from operations_within(operation)


def calls_behind(tensor: Any, known: set[int]) -> list[Any]:
    """The calls that made a symbolic tensor, producers before consumers.

    Args:
      tensor: the tensor.
      known: ids of the tensors at which to stop.
    """
    calls: list[Any] = []
    visited = set()

    def visit(tensor: Any) -> None:
        operation, index, _ = tensor._keras_history
        if id(tensor) in known or (id(operation), index) in visited:
            return
        visited.add((id(operation), index))
        call = operation._inbound_nodes[index]
        for read in call.input_tensors:
            visit(read)
        calls.append(call)

    visit(tensor)
    return calls


def logits_behind(output: Any) -> Any | None:
    """The logits that a tensor just made by softmax or sigmoid remembers, or None."""
    return getattr(output, "_keras_logits", None)


def called_by_others(model: keras.Model) -> bool:
    """Whether a model was called on symbolic tensors, and so is a part of another graph."""
    return bool(model._inbound_nodes)


def readers_of(layer: keras.layers.Layer) -> Iterator[keras.Operation]:
    """The layers and operations that read a layer's outputs, in whatever graph."""
    return (call.operation for call in layer._outbound_nodes)


def recorded_calls(operation: keras.Operation) -> list[tuple[tuple, dict]]:
    """Positional and keyword arguments of an operation's calls on symbolic tensors."""
    return [(call.arguments.args, call.arguments.kwargs) for call in operation._inbound_nodes]


def layers_within(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layer and all layers in it, however deep, in the order it keeps them."""
    return list(layer._flatten_layers())


def optimizer_weights(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The weights that a built optimizer was built on; its slot lists follow this order."""
    return list(optimizer._trainable_variables)


def own_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """An optimizer's variables in the order of files, without those of one that it wraps."""
    return list(optimizer._variables)


def trusting_configs() -> AbstractContextManager:
    """While it is open, configs may hold lambdas: for configs that come from no file."""
    return serialization_lib.SafeModeScope(safe_mode=False)


def takes_training(operation: Any) -> bool:
    """Whether a layer's call has a `training` argument."""
    return bool(getattr(operation, "_call_has_training_arg", False))


def takes_mask(operation: Any) -> bool:
    """Whether a layer's call has a `mask` argument."""
    return bool(getattr(operation, "_call_has_mask_arg", False))


def compiled_loss_weights(model: keras.Model) -> Any:
    """The `loss_weights` that a model was compiled with, None for none."""
    return getattr(model._compile_loss, "_user_loss_weights", None)


def mask_of(tensor: Any) -> Any:
    """The mask that a layer has put on a tensor, or None."""
    return backend.get_keras_mask(tensor)


def copy_mask(source: Any, target: Any) -> None:
    """Hands on the mask that a layer before has put on a tensor, unless there is one already."""
    put_mask(target, backend.get_keras_mask(source))


def put_mask(tensor: Any, mask: Any) -> None:
    """Puts a mask on a tensor, unless there is none or the tensor has one already."""
    if mask is not None and backend.get_keras_mask(tensor) is None:
        backend.set_keras_mask(tensor, mask)


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """What `model.compile` was called with, as the live objects."""
    return dict(model._compile_config.config)
