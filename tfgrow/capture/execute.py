"""Runs a model's graph in inference mode, in float32, with its inner tensors in reach.

A *tap* names a tensor inside the model: `("tensor", id)` is an output of a node, `("linear",
index)` the response of a layer with a kernel before its activation, `("input", index)` what such a
layer reads, apart from whoever else reads the same tensor. The masks that come with what an
attention layer reads are kept as `("query_mask", index)`, and so on; they can't be tapped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfgrow._keras import copy_mask, layers_within, mask_of, put_mask
from tfgrow.graph.heads import call_of
from tfgrow.graph.nodes import Graph, Node, call_operation
from tfgrow.layers.attention import Attention

Tap = tuple[str, int]


def tensor_tap(tensor: int) -> Tap:
    """The tap of a tensor, by its id."""
    return ("tensor", tensor)


def linear_tap(node_index: int) -> Tap:
    """The tap of the response of a layer with a kernel, by the index of its call."""
    return ("linear", node_index)


def input_tap(node_index: int) -> Tap:
    """The tap of what a layer with a kernel reads, by the index of its call."""
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
        copy_mask(value, seen[tap])
        return seen[tap]

    for tensor, value in zip(graph.inputs, inputs, strict=True):
        values[tensor] = pass_through(tensor_tap(tensor), value)
    for node in graph.nodes:
        args, kwargs = node.arguments(values)
        if node.weighs:
            layer = node.operation
            inputs_of_layer = pass_through(input_tap(node.index), args[0])
            response = layer.linear(inputs_of_layer, **weights_of(layer))
            response = pass_through(linear_tap(node.index), response)
            results = [layer.activate(response)]
            if layer.supports_masking:  # attention looks for the mask on what it reads
                put_mask(results[0], layer.compute_mask(args[0], mask_of(args[0])))
        else:
            seen.update(_masks(node, args, kwargs))
            results = keras.tree.flatten(call_operation(node.operation, args, kwargs))
        for tensor, value in zip(node.outputs, results, strict=True):
            values[tensor] = pass_through(tensor_tap(tensor), value)
    return seen


def _masks(node: Node, args, kwargs) -> dict[Tap, Any]:
    """The masks of what an attention layer reads, which it takes off the tensors when called."""
    if not isinstance(node.operation, Attention):
        return {}
    called = node.operation.called(args, kwargs)
    masks = {f"{name}_mask": mask_of(called[name]) for name in ("query", "value", "key")}
    return {(name, node.index): mask for name, mask in masks.items() if mask is not None}


def attention_call(node: Node, seen: Mapping[Tap, Any]) -> dict[str, Any]:
    """The arguments of an attention layer's call by name, masks that came with tensors among them.

    Args:
      node: the call.
      seen: as from `execute`.
    """
    called = call_of(node, {tensor: seen[tensor_tap(tensor)] for tensor in node.inputs})
    for name in ("query_mask", "value_mask", "key_mask"):
        if called.get(name) is None:
            called[name] = seen.get((name, node.index))
    return called


def weights_of(layer) -> Mapping[str, Any]:
    """A layer's weights as `linear` takes them."""
    return {
        name: tf.cast(tf.convert_to_tensor(variable), tf.float32)
        for name, variable in layer.growable_variables().items()
    }


@contextlib.contextmanager
def float32_compute(model: keras.Model):
    """While a graph is traced inside this block, all layers compute in float32.

    Half-precision activations would drown the small differences that growth is decided by, and
    weights are taken in float32, beside which others won't do.
    """
    layers = [layer for layer in layers_within(model) if layer.compute_dtype != "float32"]
    policies = [layer.dtype_policy for layer in layers]
    try:
        for layer, policy in zip(layers, policies, strict=True):
            other = policy.compute_dtype in ("float16", "bfloat16", "float64")
            layer.dtype_policy = keras.DTypePolicy("float32") if other else policy
        yield
    finally:
        for layer, policy in zip(layers, policies, strict=True):
            layer.dtype_policy = policy
