"""Attention layers as sites, whose units are their heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfgrow._keras import called_by_others
from tfgrow.graph.channels import why_shared
from tfgrow.graph.nodes import Graph, Node
from tfgrow.layers.attention import Attention


def heads_blocked(model, graph: Graph, layer: Attention) -> str | None:
    """Why an attention layer can't get or lose heads; None if it can."""
    if model is not None and called_by_others(model):
        return (
            f"model '{model.name}' is part of another model, which called it; grow that one: "
            "tfgrow.convert(the whole model)"
        )
    shared = why_shared(graph, layer)
    if shared is not None:
        return shared
    if not layer.trainable:
        return f"layer '{layer.name}' is frozen (trainable=False)"
    (node,) = graph.calls(layer)
    return layer.growth_blocked() or layer.call_blocked(call_of(node, graph.tensors))


def no_channels(layer: Attention) -> str:
    """What an attention layer's site says to edits that widen or narrow channels."""
    return (
        f"the units of attention layer '{layer.name}' are heads: they grow by the morphisms "
        "'heads', 'add_heads' and 'prune_heads'; its output channels can't grow"
    )


def call_of(node: Node, values: Mapping[int, Any]) -> dict[str, Any]:
    """The arguments of an attention layer's call by name.

    Args:
      node: the call.
      values: by tensor id, what to fill in for the tensors it reads.
    """
    args, kwargs = node.arguments({tensor: values[tensor] for tensor in node.inputs})
    return node.operation.called(args, kwargs)
