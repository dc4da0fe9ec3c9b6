"""Lets the symbolic shapes of a Keras graph, and what is derived from them, follow edited layers.

Keras works them out when a layer is called; after an edit nothing is called again. Writes private
attributes of Keras, as `tfgrow.surgery.rebuild` does.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.models.functional import Functional
from keras.src.ops.node import Node

from tfgrow._keras import graph_of, nodes_of, operations_within

Moved = dict[int, tuple]
"""The former shapes of the symbolic tensors whose shape the edit changed, by the tensor's id."""


def refresh_graph(model: keras.Model, changed: Iterable[keras.Layer]) -> None:
    """Recomputes all symbolic shapes and shape metadata that follow from edited layers.

    Args:
      model: a built Functional or Sequential model.
      changed: the layers whose attributes or variables were edited.

    Raises:
      ValueError: a layer downstream cannot take the new shapes; names it.
    """
    changed = list(changed)
    moved: Moved = {}
    visited: set[int] = set()
    _refresh(graph_of(model), {id(layer) for layer in changed}, moved, visited)
    _refresh_elsewhere(changed, moved, visited)


def _refresh(graph: Functional, changed: set[int], moved: Moved, visited: set[int]) -> None:
    """Refreshes the nodes of a graph in topological order, as far as the edit reaches them."""
    for node in nodes_of(graph):
        visited.add(id(node))
        if not node.is_input and _is_reached(node, changed, moved):
            _refresh_node(node, changed, moved, visited)


def _is_reached(node: Node, changed: set[int], moved: Moved) -> bool:
    return (
        id(node.operation) in changed
        or any(id(tensor) in moved for tensor in node.input_tensors)
        or any(id(operation) in changed for operation in operations_within(node.operation))
    )


def _refresh_node(node: Node, changed: set[int], moved: Moved, visited: set[int]) -> None:
    operation, arguments = node.operation, node.arguments
    inner = graph_of(operation)
    if inner is not None:
        _refresh_inputs(inner, node, moved)
        _refresh(inner, changed, moved, visited)
    try:
        if isinstance(operation, keras.Layer):
            _refresh_metadata(operation, node, moved)
        specs = _output_specs(node)
        if inner is None and isinstance(operation, keras.Layer) and operation.weights:
            # A real (traced) call: attributes, kernels and inputs must agree with one another.
            traced = backend.compute_output_spec(operation, *arguments.args, **arguments.kwargs)
            _check_agreement(specs, keras.tree.flatten(traced))
    except (ValueError, TypeError, IndexError, NotImplementedError, tf.errors.OpError) as error:
        shapes = [tuple(tensor.shape) for tensor in node.input_tensors]
        raise ValueError(
            f"Layer '{operation.name}' ({type(operation).__name__}) does not fit its inputs of "
            f"shape {shapes} after the edit. Change it in the same edit, or leave its producers as "
            f"they are. {type(error).__name__}: {error}"
        ) from error
    _set_shapes(node, specs, moved)


def _output_specs(node: Node) -> list[keras.KerasTensor]:
    operation = node.operation
    scope: Any = contextlib.nullcontext()
    if isinstance(operation, keras.Layer) and operation.compute_dtype != operation.variable_dtype:
        scope = backend.AutocastScope(operation.compute_dtype)
    with scope:
        specs = operation.compute_output_spec(*node.arguments.args, **node.arguments.kwargs)
    return keras.tree.flatten(specs)


def _check_agreement(declared: list, traced: list) -> None:
    for expected, found in zip(declared, traced, strict=True):
        pairs = list(zip(expected.shape, found.shape, strict=True))
        if any(None not in pair and pair[0] != pair[1] for pair in pairs):
            raise ValueError(
                f"its attributes say that the output has shape {tuple(expected.shape)}, its "
                f"variables give {tuple(found.shape)}"
            )


def _set_shapes(node: Node, specs: list[keras.KerasTensor], moved: Moved) -> None:
    for tensor, spec in zip(node.outputs, specs, strict=True):
        if tensor.shape != spec.shape:
            moved.setdefault(id(tensor), tensor.shape)
            tensor._shape = spec.shape


def _refresh_inputs(inner: Functional, node: Node, moved: Moved) -> None:
    """Lets the symbolic inputs of a nested model follow the tensors it is called on."""
    for outer, tensor in zip(node.input_tensors, inner.inputs, strict=False):
        shape = _follow(tensor.shape, outer, moved)
        if shape != tensor.shape:
            moved.setdefault(id(tensor), tensor.shape)
            tensor._shape = shape
            # What the config of the nested model says; the tensor comes from its InputLayer.
            tensor._keras_history.operation._batch_shape = shape


def _refresh_metadata(layer: keras.Layer, node: Node, moved: Moved) -> None:
    """Lets input spec and build config follow the shapes of the layer's arguments."""
    call = inspect.signature(layer.call).bind(*node.arguments.args, **node.arguments.kwargs)
    first = next(iter(call.arguments.values()))
    if graph_of(layer) is None and layer.input_spec is not None:
        specs, tensors = keras.tree.flatten(layer.input_spec), keras.tree.flatten(first)
        renewed = [_follow_spec(*pair, moved) for pair in zip(specs, tensors, strict=False)]
        layer.input_spec = renewed if isinstance(layer.input_spec, list) else renewed[0]
    shapes = layer._build_shapes_dict
    if shapes:
        layer._build_shapes_dict = {
            name: _follow(
                shape,
                first if len(shapes) == 1 else call.arguments.get(name.removesuffix("_shape")),
                moved,
            )
            for name, shape in shapes.items()
        }


def _follow(stored: Any, argument: Any, moved: Moved) -> Any:
    """A stored shape (or structure of shapes), with the dimensions that moved in the argument's."""
    if stored is None or argument is None:
        return stored
    if isinstance(argument, keras.KerasTensor):
        old = moved.get(id(argument), argument.shape)
        if len(old) != len(stored) or len(old) != len(argument.shape):
            return stored
        return tuple(
            kept if before == after else after
            for kept, before, after in zip(stored, old, argument.shape, strict=True)
        )
    if isinstance(argument, dict):
        return {name: _follow(shape, argument.get(name), moved) for name, shape in stored.items()}
    if isinstance(argument, (list, tuple)):
        return [_follow(*pair, moved) for pair in zip(stored, argument, strict=True)]
    return stored


def _follow_spec(spec: Any, tensor: Any, moved: Moved) -> Any:
    """A new InputSpec with the dimensions that moved; never an edit of the old one."""
    if id(tensor) not in moved:
        return spec
    old, new = moved[id(tensor)], tensor.shape
    renewed = copy.copy(spec)
    renewed.shape = _follow(spec.shape, tensor, moved)
    renewed.axes = {
        axis: size if old[axis] == new[axis] else new[axis]
        for axis, size in (spec.axes or {}).items()
    }
    return renewed


def _refresh_elsewhere(layers: list[keras.Layer], moved: Moved, visited: set[int]) -> None:
    """Lets shapes outside the model's graph follow, where the same layers were called too.

    `Sequential.add` leaves such calls behind, and `layer.output` means the first call. A layer
    there that does not fit belongs to another model, which shares layers: its shapes stay.
    """
    for node in _reached_elsewhere(layers, visited):
        with contextlib.suppress(Exception):
            _set_shapes(node, _output_specs(node), moved)


def _reached_elsewhere(layers: list[keras.Layer], visited: set[int]) -> list[Node]:
    """Nodes not visited that the layers' outputs reach, producers before consumers."""
    order: list[Node] = []
    seen = set(visited)

    def visit(node: Node) -> None:
        if id(node) not in seen:
            seen.add(id(node))
            for consumer in _consumers(node):
                visit(consumer)
            order.append(node)

    for layer in layers:
        for node in layer._inbound_nodes:
            if id(node) in visited:
                for consumer in _consumers(node):
                    visit(consumer)
            visit(node)
    return order[::-1]


def _consumers(node: Node) -> list[Node]:
    outputs = {id(tensor) for tensor in node.outputs}
    return [
        consumer
        for consumer in node.operation._outbound_nodes
        if any(id(tensor) in outputs for tensor in consumer.input_tensors)
    ]
