"""Where a constant goes that is to be added to what a mixing layer computes, at every position."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras

from tfgrow.graph.nodes import Graph, Node
from tfgrow.layers.growable import Mixing
from tfgrow.layers.registry import blocked_reason, channelwise_view


@dataclasses.dataclass(frozen=True, eq=False)
class Absorber:
    """A variable that does as much as a constant added to a mixing layer's response.

    Attributes:
      layer: whose it is.
      variable: its name, with an entry per channel of the response.
      sign: 1 where it is added, -1 where it is subtracted.
    """

    layer: Any
    variable: str
    sign: float


def absorber_of(graph: Graph, node: Node) -> Absorber | None:
    """What can take over a constant added to a mixing layer's response; None if nothing can.

    The layer's own bias, or else what a layer right behind it subtracts: the moving mean of a
    BatchNormalization, which training would bring there too.

    Args:
      graph: the traced model.
      node: a call of a mixing layer.
    """
    layer = node.operation
    if layer.absorbs_constant:
        return Absorber(layer, "bias", 1.0)
    (response,) = node.outputs
    readers = graph.readers(response)
    if response in graph.outputs or len(readers) != 1 or _activates(layer):
        return None
    follower = readers[0].operation
    name = getattr(channelwise_view(follower), "subtracted", None)
    if name is None or len(graph.calls(follower)) != 1 or blocked_reason(follower) is not None:
        return None
    return Absorber(follower, name, -1.0)


def _activates(layer: Mixing) -> bool:
    """Whether something may stand between a mixing layer's response and its output."""
    if type(layer).activate is not Mixing.activate:
        return True
    return getattr(layer, "activation", None) not in (None, keras.activations.linear)
