"""Sites: the places of a model whose width can change.

A site is a producer (a mixing layer) or several that are tied, the channelwise path after them, and
the consumers at the path's ends. Every place that can't grow is a site too, with the reason in
`blocked`.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import keras

from tfgrow._keras import called_by_others, readers_of
from tfgrow.graph.channels import Flow, join_of, tied_inputs, why_shared
from tfgrow.graph.heads import heads_blocked, no_channels
from tfgrow.graph.nodes import Graph, Node, trace
from tfgrow.graph.versions import version_of
from tfgrow.layers import registry
from tfgrow.layers.attention import Attention
from tfgrow.layers.growable import GrowableChannelwise, Mixing
from tfgrow.layers.joins import Join, in_a_row, join_view
from tfgrow.layers.unsupported import unsupported
from tfgrow.types import ChannelMap


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One layer of a path: channelwise, or a join of several tensors.

    Attributes:
      view: the layer as tfgrow sees it.
      layer: the Keras layer itself (the producer, for its own activation).
      node: its call; None for a producer's own activation.
      sources: ids of the tensors it reads that carry the site's channels.
      outside: ids of the other tensors it reads, as far as their values matter.
      target: id of the tensor it makes.
      incoming: where the site's channels lie on the last axis of the first source.
      input_shape: static shape of the first source.
    """

    view: Any  # Channelwise | Join
    layer: Any
    node: Node | None
    sources: tuple[int, ...]
    outside: tuple[int, ...]
    target: int
    incoming: ChannelMap
    input_shape: tuple

    @property
    def source(self) -> int:
        """The tensor it reads, or the first of them."""
        return self.sources[0]

    def channel_map(self, maps: dict[int, ChannelMap]) -> ChannelMap:
        """Where channels lie on what it makes, given where they lie on what it reads."""
        if not isinstance(self.view, Join):
            return self.view.channel_map(maps[self.source], self.input_shape)
        if self.view.ties or self.node is None:
            return maps[self.source]
        read = [tensor for tensor in self.node.inputs if tensor in self.sources]
        row = in_a_row([(maps[tensor].size, maps[tensor]) for tensor in read])
        assert row is not None
        return row


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """An end of a path: a tensor that consumers read.

    Attributes:
      tensor: its id.
      channels: where the site's channels lie on its last axis.
      consumers: the nodes that read it, all mixing layers.
      passed_on: whether the site's path goes on behind it too: then the gradient at the tensor is
        not that of what the consumers read alone.
      first: whether it is the first of the sites whose channels lie on the tensor.
    """

    tensor: int
    channels: ChannelMap
    consumers: tuple[Node, ...]
    passed_on: bool = False
    first: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One widenable place of a model, or one that isn't, with the reason.

    Attributes:
      name: the producer's name.
      producer: the layer that makes the channels; the first of them if several are tied.
      producers: all nodes that make them (empty if the layer isn't called exactly once): what an
        addition or a gate ties widens together.
      units: how many there are; 0 if tfgrow can't tell, or none is the layer's own (of a depthwise
        convolution), and then the site is blocked.
      steps: the layers after them, in topological order.
      leaves: the path's ends.
      blocked: None, or why the site can't be widened unit by unit. The site of an attention layer
        always says so: its units are groups of heads, not channels.
      doubles: whether its units can be doubled, all at once, although it is blocked: a layer of its
        path normalises over the channels.
      version: the model's version when the site was traced.
      graph: the graph it was found in.
    """

    name: str
    producer: Any
    producers: tuple[Node, ...]
    units: int
    steps: tuple[Step, ...]
    leaves: tuple[Leaf, ...]
    blocked: str | None
    version: int
    graph: Graph = dataclasses.field(repr=False)
    model: weakref.ref = dataclasses.field(repr=False)
    doubles: bool = False

    @property
    def node(self) -> Node | None:
        """The producer's call, if there is exactly one."""
        return self.producers[0] if self.producers else None

    @property
    def consumers(self) -> tuple:
        """The layers that read the site's channels."""
        return tuple(node.operation for leaf in self.leaves for node in leaf.consumers)

    @property
    def resizable(self) -> bool:
        """Whether some kind of edit can change the number of its units: channels, or heads."""
        if not isinstance(self.producer, Attention):
            return self.widens
        return self.heads_blocked is None

    @property
    def widens(self) -> bool:
        """Whether it can have more channels: unit by unit, or all doubled at once."""
        return self.blocked is None or self.doubles

    @property
    def heads_blocked(self) -> str | None:
        """Why its units are no heads that can grow; None if they are."""
        if not isinstance(self.producer, Attention):
            return f"layer '{self.name}' ({type(self.producer).__name__}) has no attention heads"
        return heads_blocked(self.model(), self.graph, self.producer)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all its producers: the site answers to each of them."""
        return (self.name, *(node.name for node in self.producers[1:]))

    def __repr__(self) -> str:
        makers = self.name if len(self.producers) < 2 else " + ".join(self.names)
        if self.blocked:
            return f"<Site {makers}: {self.units} units, blocked: {self.blocked}>"
        readers = ", ".join(layer.name for layer in self.consumers)
        path = " -> ".join(step.layer.name for step in self.steps)
        return f"<Site {makers}: {self.units} units -> {path or 'directly'} -> {readers}>"


def find_sites(model: keras.Model) -> list[Site]:
    """Lists every place of a model whose width could matter.

    Args:
      model: a built Functional or Sequential model, usually made growable by `tfgrow.convert`.

    Returns:
      The sites in topological order. A site with `blocked` set can't be widened, and `blocked`
      says why; nothing is left out. Layers whose channels are added or multiplied can only widen
      together: they are one site, named after the first of them.

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
    flow = Flow(graph)
    sites, seen = [], set()
    for node in graph.nodes:
        layer = node.operation
        if id(layer) in seen:
            continue
        if registry.channelwise_view(layer) is not None or join_view(layer) is not None:
            if node.weighs:
                sites.append(_blocked(model, graph, node, _width_of_its_input(layer)))
                seen.add(id(layer))
            continue
        seen.add(id(layer))
        if isinstance(layer, Attention):
            reason = heads_blocked(model, graph, layer) or no_channels(layer)
            sites.append(_blocked(model, graph, node, reason))
            continue
        if not isinstance(layer, Mixing):
            if getattr(layer, "weights", None):
                sites.append(_blocked(model, graph, node, _unknown_producer(layer)))
            continue
        site = _site(model, graph, flow, node)
        sites.append(site)
        if site.widens:
            seen |= {id(other.operation) for other in site.producers}
    return sites


def _site(model, graph: Graph, flow: Flow, node: Node) -> Site:
    reason = _why_blocked(model, graph, flow, node)
    if reason is not None:
        return _blocked(model, graph, node, reason)
    producers = tuple(flow.tied(node.index))
    steps, leaves = _path(graph, flow, flow.root(node.index))
    if not leaves:
        return _blocked(model, graph, node, f"nothing reads the channels of '{node.name}'")
    reason = _used_elsewhere(model, graph, node, producers, steps)
    if reason is not None:
        return _blocked(model, graph, node, reason)
    coupled = flow.coupled(node.index)
    return Site(
        name=node.name,
        producer=node.operation,
        producers=producers,
        units=node.operation.growth_units,
        steps=steps,
        leaves=leaves,
        blocked=None if coupled is None else _only_doubled(node, coupled),
        version=version_of(model),
        graph=graph,
        model=weakref.ref(model),
        doubles=coupled is not None,
    )


def _only_doubled(node: Node, coupled: str) -> str:
    return (
        f"the channels of '{node.name}' reach {coupled}, which normalises over the channels, so "
        "that a single new unit would change what the others hand on: they can only be doubled, "
        "all at once (morphism 'double'); to let single units grow, use BatchNormalization instead"
    )


def _blocked(model, graph: Graph, node: Node, reason: str) -> Site:
    layer = node.operation
    units = layer.growth_units if isinstance(layer, Mixing) else _units_attribute(layer)
    if isinstance(layer, Attention):
        units = layer.attention_units
    return Site(
        name=layer.name,
        producer=layer,
        producers=() if len(graph.calls(layer)) > 1 else (node,),
        units=units,
        steps=(),
        leaves=(),
        blocked=reason,
        version=version_of(model),
        graph=graph,
        model=weakref.ref(model),
    )


def _width_of_its_input(layer) -> str:
    return (
        f"layer '{layer.name}' ({type(layer).__name__}) treats every channel by itself: it is as "
        "wide as what it reads, and grows with it"
    )


def _units_attribute(layer) -> int:
    if isinstance(layer, GrowableChannelwise):
        return 0
    units = getattr(layer, "units", getattr(layer, "filters", None))
    return units if isinstance(units, int) else 0


def _why_blocked(model, graph: Graph, flow: Flow, node: Node) -> str | None:
    if called_by_others(model):
        # Growing part of another model would leave that one's optimizer and functions behind.
        return (
            f"model '{model.name}' is part of another model, which called it; grow that one: "
            "tfgrow.convert(the whole model)"
        )
    own = _producer_blocked(graph, node)
    if own is not None:
        return own
    for other in flow.tied(node.index):
        reason = _producer_blocked(graph, other)
        if reason is not None:
            return f"its channels are tied to those of '{other.name}', which can't grow: {reason}"
    return flow.reason(node.index)


def _producer_blocked(graph: Graph, node: Node) -> str | None:
    layer = node.operation
    shared = why_shared(graph, layer)
    if shared is not None:
        return shared
    if not layer.trainable:
        return f"layer '{layer.name}' is frozen (trainable=False)"
    if node.outputs[0] in graph.outputs:
        return f"layer '{layer.name}' is an output layer: its width is the model's output"
    return registry.producer_blocked(layer)


def _used_elsewhere(model, graph: Graph, node: Node, producers, steps) -> str | None:
    """The layers of a site must not feed layers of another model, which could not follow."""
    for layer in (*(n.operation for n in producers), *(step.layer for step in steps)):
        for reader in readers_of(layer) if isinstance(layer, keras.layers.Layer) else ():
            if not graph.calls(reader) and getattr(reader, "weights", None):
                return (
                    f"the channels of '{node.name}' also reach layer '{reader.name}', which is "
                    f"not part of model '{model.name}'; give that model layers of its own"
                )
    return None


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


def _path(graph: Graph, flow: Flow, root: int) -> tuple[tuple[Step, ...], tuple[Leaf, ...]]:
    """All layers that some channels pass through, and all tensors at which others read them."""
    steps: list[Step] = []
    consumers: dict[int, list[Node]] = {}
    for node in flow.readers(root):
        mine = tuple(t for t in dict.fromkeys(node.inputs) if root in flow.at(t))
        if node.mixing:
            consumers.setdefault(mine[0], []).append(node)
        else:
            steps.append(_step(graph, flow, root, node, mine))
    passed_on = {tensor for step in steps for tensor in step.sources}
    leaves = tuple(
        Leaf(tensor, owners[root], tuple(nodes), tensor in passed_on, root == min(owners))
        for tensor, nodes in consumers.items()
        for owners in [flow.at(tensor)]
    )
    return tuple(steps), leaves


def _step(graph: Graph, flow: Flow, root: int, node: Node, mine: tuple[int, ...]) -> Step:
    layer = node.operation
    view: Any = join_of(graph, node) or registry.channelwise_view(layer)
    outside: tuple[int, ...] = ()
    if isinstance(view, Join) and view.ties:
        mine = tuple(tied_inputs(flow, node))
        outside = tuple(tensor for tensor in dict.fromkeys(node.inputs) if tensor not in mine)
    shape = tuple(graph.tensors[mine[0]].shape)
    return Step(view, layer, node, mine, outside, node.outputs[0], flow.at(mine[0])[root], shape)


def steps_with_activation(site: Site) -> tuple[Step, ...]:
    """The site's steps, preceded by the producers' own activations: the way of the responses.

    The response of producer i has the tensor id `response_id(i)`; its output keeps its own.
    """
    return (*_activations(site), *site.steps)


def _activations(site: Site) -> Iterator[Step]:
    units = ChannelMap.identity(site.units)
    for number, node in enumerate(site.producers):
        view = registry.OwnActivation(node.operation)
        source, target = (response_id(number),), node.outputs[0]
        yield Step(view, node.operation, None, source, (), target, units, ())


def response_id(number: int) -> int:
    """Tensor id, within a site's path, of a producer's response before its activation."""
    return -1 - number


def channel_maps(site: Site, count: int) -> dict[int, ChannelMap]:
    """Tensor id -> where `count` units of the site would lie there, were they all it has."""
    identity = ChannelMap.identity(count)
    maps = {response_id(number): identity for number in range(len(site.producers))}
    for step in steps_with_activation(site):
        maps[step.target] = step.channel_map(maps)
    return maps


def parameter_name(name: str, producer: int) -> str:
    """What a parameter of theta is called that belongs to one of a site's producers.

    Args:
      name: of the producer's variable.
      producer: number of the producer; the first one's parameters go by the variable's own name.
    """
    return name if producer == 0 else f"{name}/{producer}"
