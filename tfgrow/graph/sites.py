"""Sites: the places of a model whose width can change.

A site is a producer (a mixing layer), the channelwise path after it, and the consumers at the
path's ends. Every place that can't grow is a site too, with the reason in `blocked`.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import keras

from tfgrow._keras import called_by_others, readers_of, takes_mask
from tfgrow.graph.nodes import Graph, Node, trace
from tfgrow.graph.versions import version_of
from tfgrow.layers import registry
from tfgrow.layers.growable import Channelwise, Mixing
from tfgrow.layers.unsupported import unsupported
from tfgrow.types import ChannelMap


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One channelwise layer of a path.

    Attributes:
      view: the layer as tfgrow sees it.
      layer: the Keras layer itself (the producer, for its own activation).
      source, target: ids of the tensors it reads and makes.
      incoming: where the site's channels lie on the last axis of what it reads.
      input_shape: static shape of what it reads.
    """

    view: Channelwise
    layer: Any
    source: int
    target: int
    incoming: ChannelMap
    input_shape: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """An end of a path: a tensor that consumers read.

    Attributes:
      tensor: its id.
      channels: where the site's channels lie on its last axis.
      consumers: the nodes that read it, all mixing layers.
    """

    tensor: int
    channels: ChannelMap
    consumers: tuple[Node, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One widenable place of a model, or one that isn't, with the reason.

    Attributes:
      name: the producer's name.
      producer: the layer that makes the channels.
      units: how many there are; 0 if tfgrow can't tell, and then the site is blocked.
      node: the producer's `Node` (None if the layer isn't called exactly once: then it is blocked).
      steps: the channelwise layers after it, in topological order.
      leaves: the path's ends.
      blocked: None, or why the site can't be widened.
      version: the model's version when the site was traced.
    """

    name: str
    producer: Any
    units: int
    node: Any
    steps: tuple[Step, ...]
    leaves: tuple[Leaf, ...]
    blocked: str | None
    version: int
    model: weakref.ref = dataclasses.field(repr=False)

    @property
    def consumers(self) -> tuple:
        """The layers that read the site's channels."""
        return tuple(node.operation for leaf in self.leaves for node in leaf.consumers)

    def __repr__(self) -> str:
        if self.blocked:
            return f"<Site {self.name}: {self.units} units, blocked: {self.blocked}>"
        readers = ", ".join(layer.name for layer in self.consumers)
        path = " -> ".join(step.layer.name for step in self.steps)
        return f"<Site {self.name}: {self.units} units -> {path or 'directly'} -> {readers}>"


class _Blocked(Exception):
    """Carries the reason out of the walk along a path."""


def find_sites(model: keras.Model) -> list[Site]:
    """Lists every place of a model whose width could matter.

    Args:
      model: a built Functional or Sequential model, usually made growable by `tfgrow.convert`.

    Returns:
      The sites in topological order. A site with `blocked` set can't be widened, and `blocked`
      says why; nothing is left out.

    Example:

    >>> import keras, tfgrow
    >>> inputs = keras.Input((4,))
    >>> hidden = keras.layers.Dense(3, activation="relu", name="hidden")(inputs)
    >>> model = tfgrow.convert(keras.Model(inputs, keras.layers.Dense(2, name="out")(hidden)))
    >>> [(site.name, site.units, site.blocked is None) for site in tfgrow.find_sites(model)]
    [('hidden', 3, True), ('out', 2, False)]
    """
    return sites_of(model, trace(model))


def sites_of(model: keras.Model, graph: Graph) -> list[Site]:
    """`find_sites` on a graph that is traced already."""
    sites, seen = [], set()
    for node in graph.nodes:
        layer = node.operation
        if id(layer) in seen or registry.channelwise_view(layer) is not None:
            continue
        seen.add(id(layer))
        if isinstance(layer, Mixing) or getattr(layer, "weights", None):
            sites.append(_site(model, graph, node))
    return sites


def _site(model, graph: Graph, node: Node) -> Site:
    layer = node.operation
    steps: tuple[Step, ...] = ()
    leaves: tuple[Leaf, ...] = ()
    blocked = None
    try:
        _check_whole(model)
        _check_producer(graph, node)
        steps, leaves = _walk(graph, node)
        _check_used_here_only(model, graph, node, steps)
    except _Blocked as reason:
        blocked = str(reason)
    return Site(
        name=layer.name,
        producer=layer,
        units=_units(layer),
        node=None if len(graph.calls(layer)) > 1 else node,
        steps=steps,
        leaves=leaves,
        blocked=blocked,
        version=version_of(model),
        model=weakref.ref(model),
    )


def _units(layer) -> int:
    if isinstance(layer, Mixing):
        return layer.growth_units
    units = getattr(layer, "units", getattr(layer, "filters", None))
    return units if isinstance(units, int) else 0


def _check_whole(model) -> None:
    """Growing part of another model would leave that one's optimizer and functions behind."""
    if called_by_others(model):
        raise _Blocked(
            f"model '{model.name}' is part of another model, which called it; grow that one: "
            "tfgrow.convert(the whole model)"
        )


def _check_used_here_only(model, graph: Graph, node: Node, steps) -> None:
    """The layers of a site must not feed layers of another model, which could not follow."""
    own = {id(n.operation) for n in graph.nodes}
    for layer in (node.operation, *(step.layer for step in steps)):
        for reader in readers_of(layer):
            if id(reader) not in own and getattr(reader, "weights", None):
                raise _Blocked(
                    f"the channels of '{node.name}' also reach layer '{reader.name}', which is "
                    f"not part of model '{model.name}'; give that model layers of its own"
                )


def _check_producer(graph: Graph, node: Node) -> None:
    layer = node.operation
    if not isinstance(layer, Mixing):
        raise _Blocked(_unknown_producer(layer))
    _check_called_once(graph, layer)
    if not layer.trainable:
        raise _Blocked(f"layer '{layer.name}' is frozen (trainable=False)")
    if node.outputs[0] in graph.outputs:
        raise _Blocked(f"layer '{layer.name}' is an output layer: its width is the model's output")
    reason = registry.producer_blocked(layer)
    if reason:
        raise _Blocked(reason)


def _unknown_producer(layer) -> str:
    kind = type(layer).__name__
    if isinstance(layer, keras.Model):
        return (
            f"'{layer.name}' is a nested model; tfgrow.convert(model) inlines nested Functional "
            "and Sequential models"
        )
    if registry.growable_class(layer) is not None:
        return (
            f"layer '{layer.name}' is a stock {kind}; make the model growable with "
            "tfgrow.convert(model)"
        )
    if known := unsupported(layer):
        return f"layer '{layer.name}' ({kind}), {known}"
    return (
        f"layer '{layer.name}' ({kind}) has weights that tfgrow doesn't know how to widen; "
        "subclass tfgrow.layers.Mixing to teach it"
    )


def _check_called_once(graph: Graph, layer) -> None:
    calls = len(graph.calls(layer))
    if calls > 1:
        raise _Blocked(f"layer '{layer.name}' is shared: it is called {calls} times")


def _walk(graph: Graph, producer: Node) -> tuple[tuple[Step, ...], tuple[Leaf, ...]]:
    """Follows a producer's channels to all their consumers."""
    layer = producer.operation
    tensor = producer.outputs[0]
    identity = ChannelMap.identity(layer.growth_units)
    steps = []
    leaves: dict[int, Leaf] = {}
    frontier = [(tensor, identity)]
    while frontier:
        tensor, channels = frontier.pop(0)
        readers = graph.readers(tensor)
        if tensor in graph.outputs:
            raise _Blocked(f"the channels of '{layer.name}' reach the model's output unmixed")
        if not readers:
            raise _Blocked(f"nothing reads the channels of '{layer.name}'")
        for node in readers:
            if node.mixing:
                _check_consumer(graph, node, layer)
                _add_consumer(leaves, tensor, channels, node)
                continue
            step = _step(graph, node, tensor, channels, layer)
            steps.append(step)
            frontier.append((step.target, step.view.channel_map(step.incoming, step.input_shape)))
    return tuple(steps), tuple(leaves.values())


def _add_consumer(leaves, tensor, channels, node) -> None:
    known = leaves.get(tensor)
    consumers = (*known.consumers, node) if known else (node,)
    leaves[tensor] = Leaf(tensor, channels, consumers)


def _check_consumer(graph: Graph, node: Node, producer) -> None:
    consumer = node.operation
    _check_called_once(graph, consumer)
    reason = registry.consumer_blocked(consumer)
    if reason:
        raise _Blocked(f"the channels of '{producer.name}' reach a blocked consumer: {reason}")
    if not consumer.trainable:
        raise _Blocked(
            f"the channels of '{producer.name}' reach layer '{consumer.name}', which is frozen "
            "(trainable=False)"
        )


def _step(graph: Graph, node: Node, tensor: int, channels: ChannelMap, producer) -> Step:
    layer = node.operation
    view = registry.channelwise_view(layer)
    if view is not None and len(node.inputs) == 2 and takes_mask(layer):
        raise _Blocked(
            f"the channels of '{producer.name}' reach layer '{layer.name}' ({type(layer).__name__})"
            ", which reads a mask (of Masking or Embedding(mask_zero=True)) beside them: paths are "
            "followed unmasked"
        )
    if view is None or len(node.inputs) != 1:
        raise _Blocked(
            f"the channels of '{producer.name}' reach '{node.name}' ({type(layer).__name__}), "
            + _why_not_channelwise(layer)
        )
    reason = registry.blocked_reason(layer)
    if reason:
        raise _Blocked(f"on the path of '{producer.name}': {reason}")
    # What has neither weights nor a shape to adapt may be called as often as one likes.
    if getattr(layer, "weights", None) or view.resized_attributes(channels.size):
        _check_called_once(graph, layer)
    shape = tuple(graph.tensors[tensor].shape)
    output_shape = graph.tensors[node.outputs[0]].shape
    if len(output_shape) < len(shape) and None in shape[1:] and _flattens(view, channels, shape):
        raise _Blocked(
            f"layer '{layer.name}' flattens a tensor of unknown size {shape}; give the model's "
            "input a static shape"
        )
    return Step(view, layer, tensor, node.outputs[0], channels, shape)


def _flattens(view: Channelwise, channels: ChannelMap, shape) -> bool:
    known = tuple(2 if size is None else size for size in shape)
    return view.channel_map(channels, known).blocks != channels.blocks


def _why_not_channelwise(layer) -> str:
    if isinstance(layer, keras.layers.Layer) and type(layer).__name__ in (
        "Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate", "Dot",
    ):  # fmt: skip
        return "which ties them to the channels of other layers"
    if known := unsupported(layer):
        return known
    if registry.growable_class(layer) is not None:
        return "a stock layer; make the model growable with tfgrow.convert(model)"
    return "which mixes channels or is unknown to tfgrow"


def steps_with_activation(site: Site) -> tuple[Step, ...]:
    """The site's steps, preceded by the producer's own activation: the way of the response u.

    The response has the tensor id `RESPONSE`; the producer's output keeps its own.
    """
    producer = site.producer
    units = ChannelMap.identity(site.units)
    activation = Step(
        registry.OwnActivation(producer), producer, RESPONSE, site.node.outputs[0], units, ()
    )
    return (activation, *site.steps)


RESPONSE = -1
"""Tensor id, within a site's path, of the producer's response before its activation."""


def channel_maps(site: Site, count: int) -> dict[int, ChannelMap]:
    """Tensor id -> where `count` units of the site would lie there, were they all it has."""
    maps = {RESPONSE: ChannelMap.identity(count)}
    for step in steps_with_activation(site):
        maps[step.target] = step.view.channel_map(maps[step.source], step.input_shape)
    return maps
