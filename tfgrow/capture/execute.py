"""Runs a model's graph in inference mode, in float32, with its inner tensors in reach.

A *tap* names a tensor inside the model: `("tensor", id)` is an output of a node, `("linear",
index)` the response of a mixing layer before its activation, `("input", index)` what a mixing layer
reads, apart from whoever else reads the same tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfgrow._keras import layers_within
from tfgrow.graph.nodes import Graph, call_operation

Tap = tuple[str, int]


def tensor_tap(tensor: int) -> Tap:
    """The tap of a tensor, by its id."""
    return ("tensor", tensor)


def linear_tap(node_index: int) -> Tap:
    """The tap of a mixing layer's response, by the index of its call."""
    return ("linear", node_index)


def input_tap(node_index: int) -> Tap:
    """The tap of what a mixing layer reads, by the index of its call."""
    return ("input", node_index)


def execute(
    graph: Graph, inputs, intercept: Callable[[Tap, Any], Any] | None = None
) -> dict[Tap, Any]:
    """Runs the graph and returns the value of every tap.

    Args:
      graph: the traced model.
      inputs: flat list of input tensors.
      intercept: called with each tap and its value; what it returns is used instead.
    """
    seen: dict[Tap, Any] = {}
    values: dict[int, Any] = {}

    def pass_through(tap, value):
        seen[tap] = value if intercept is None else intercept(tap, value)
        return seen[tap]

    for tensor, value in zip(graph.inputs, inputs, strict=True):
        values[tensor] = pass_through(tensor_tap(tensor), value)
    for node in graph.nodes:
        args, kwargs = node.arguments(values)
        if node.mixing:
            layer = node.operation
            inputs_of_layer = pass_through(input_tap(node.index), args[0])
            response = layer.linear(inputs_of_layer, **weights_of(layer))
            response = pass_through(linear_tap(node.index), response)
            results = [layer.activate(response)]
        else:
            results = keras.tree.flatten(call_operation(node.operation, args, kwargs))
        for tensor, value in zip(node.outputs, results, strict=True):
            values[tensor] = pass_through(tensor_tap(tensor), value)
    return seen


def weights_of(layer) -> Mapping[str, Any]:
    """A mixing layer's weights as `linear` takes them."""
    return {
        name: tf.cast(tf.convert_to_tensor(variable), tf.float32)
        for name, variable in layer.growable_variables().items()
    }


@contextlib.contextmanager
def float32_compute(model: keras.Model):
    """While a graph is traced inside this block, all layers compute in float32.

    Half-precision activations would drown the small differences that growth is decided by.
    """
    layers = [layer for layer in layers_within(model) if layer.compute_dtype != "float32"]
    policies = [layer.dtype_policy for layer in layers]
    try:
        for layer, policy in zip(layers, policies, strict=True):
            half = policy.compute_dtype in ("float16", "bfloat16")
            layer.dtype_policy = keras.DTypePolicy("float32") if half else policy
        yield
    finally:
        for layer, policy in zip(layers, policies, strict=True):
            layer.dtype_policy = policy
