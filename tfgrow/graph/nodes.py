"""A Keras model's graph of layer calls, as a frozen value that can be executed with taps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras

from tfgrow import _keras
from tfgrow.graph.ties import Tie, ties_between
from tfgrow.layers.growable import KernelLayer, Mixing


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One call of one layer (or Keras operation).

    Attributes:
      index: position in the topological order; names the node in taps.
      operation: the layer or operation called.
      inputs: ids of the tensors it reads, in argument order.
      outputs: ids of the tensors it makes.
      arguments: fills computed tensors into the recorded call arguments.
    """

    index: int
    operation: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: Callable[[Mapping[int, Any]], tuple[tuple, dict]]

    @property
    def name(self) -> str:
        return self.operation.name

    @property
    def mixing(self) -> bool:
        return isinstance(self.operation, Mixing)

    @property
    def weighs(self) -> bool:
        """Whether it has a kernel, and a response before its activation that is linear in it."""
        return isinstance(self.operation, KernelLayer)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A model's nodes in topological order; tensors are known by small integers.

    Attributes:
      nodes: the calls, without input layers.
      inputs: tensor ids of the model's inputs, flat.
      input_keys: what a dict of inputs calls each of them, in the same order.
      outputs: tensor ids of the model's outputs, flat.
      output_keys: what a dict of targets or losses calls each of them, in the same order.
      names_outputs: whether the model itself gives its outputs as a dict.
      tensors: the symbolic tensor of each id (its `shape` follows the model's growth).
    """

    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    input_keys: tuple[str, ...]
    outputs: tuple[int, ...]
    output_keys: tuple[str, ...]
    names_outputs: bool
    tensors: Mapping[int, Any]

    def readers(self, tensor: int) -> list[Node]:
        """The nodes that read a tensor."""
        return [node for node in self.nodes if tensor in node.inputs]

    def calls(self, layer) -> list[Node]:
        """The nodes that call a layer."""
        return self._calls.get(id(layer), [])

    def maker(self, tensor: int) -> Node | None:
        """The node that makes a tensor; None for an input."""
        return self._makers.get(tensor)

    @functools.cached_property
    def ties(self) -> dict[int, Tie]:
        """By id of each layer that has a weight in common with another one: how it is tied."""
        return ties_between(node.operation for node in self.nodes)

    # Asked for every tensor of every path: to search all nodes each time takes deep models seconds.

    @functools.cached_property
    def _calls(self) -> dict[int, list[Node]]:
        calls: dict[int, list[Node]] = {}
        for node in self.nodes:
            calls.setdefault(id(node.operation), []).append(node)
        return calls

    @functools.cached_property
    def _makers(self) -> dict[int, Node]:
        return {tensor: node for node in self.nodes for tensor in node.outputs}


def functional_of(model: keras.Model) -> Any:
    """The functional graph of a built Functional or Sequential model, or a clear error."""
    functional = _keras.graph_of(model)
    if functional is not None:
        return functional
    if isinstance(model, keras.Sequential):
        raise ValueError(
            f"Sequential model '{model.name}' is not built, so it has no graph to trace. Give it a "
            "keras.Input as its first layer, or call it on data once."
        )
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a keras.Model, found {type(model).__name__}: {model!r}")
    raise TypeError(
        f"Model '{model.name}' is a subclassed model ({type(model).__name__}): it has no graph of "
        "layers to trace. Write it with the Functional API or as keras.Sequential."
    )


def trace(model: keras.Model) -> Graph:
    """The graph of a Functional or Sequential model.

    Raises:
      ValueError: if a Sequential model isn't built.
      TypeError: if the model is subclassed, or isn't a model.
    """
    functional = functional_of(model)
    ids: dict[int, int] = {}
    tensors: dict[int, Any] = {}

    def number(tensor) -> int:
        if id(tensor) not in ids:
            ids[id(tensor)] = len(ids)
            tensors[ids[id(tensor)]] = tensor
        return ids[id(tensor)]

    inputs = tuple(number(tensor) for tensor in functional.inputs)
    nodes = []
    for call in _keras.calls_of(functional):
        nodes.append(
            Node(
                index=len(nodes),
                operation=call.operation,
                inputs=tuple(number(tensor) for tensor in call.input_tensors),
                outputs=tuple(number(tensor) for tensor in call.outputs),
                arguments=_filler(call.arguments, ids),
            )
        )
    return Graph(
        nodes=tuple(nodes),
        inputs=inputs,
        input_keys=_input_keys(functional),
        outputs=tuple(number(tensor) for tensor in functional.outputs),
        output_keys=_output_keys(functional),
        names_outputs=_names_outputs(functional),
        tensors=tensors,
    )


def _input_keys(functional) -> tuple[str, ...]:
    if isinstance(functional.input, dict):
        return tuple(keras.tree.flatten({key: key for key in functional.input}))
    return tuple(tensor.name for tensor in functional.inputs)


def _output_keys(functional) -> tuple[str, ...]:
    if _names_outputs(functional):
        return tuple(keras.tree.flatten({key: key for key in functional.output}))
    return tuple(functional.output_names)


def _names_outputs(functional) -> bool:
    outputs = functional.output
    return isinstance(outputs, dict) and len(outputs) == len(functional.outputs)


def _filler(arguments, ids):
    def fill(values):
        by_tensor = {key: values[number] for key, number in ids.items() if number in values}
        return arguments.fill_in(by_tensor)

    return fill


def call_operation(operation, args, kwargs):
    """Calls a layer in inference mode, or a Keras operation."""
    if _keras.takes_training(operation):
        kwargs = {**kwargs, "training": False}
    return operation(*args, **kwargs)
