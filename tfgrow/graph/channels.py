"""Where channels flow: whose they are on every tensor's last axis, and which ones are tied.

The channels of a mixing layer keep their identity through channelwise layers. An elementwise join
of several tensors (Add, Multiply...) ties the channels that meet in it: they can only widen
together, and are known by the first of the layers that make them. A concatenation puts them in a
row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import keras
import numpy as np

from tfgrow._keras import takes_mask
from tfgrow.graph.nodes import Graph, Node
from tfgrow.layers import registry
from tfgrow.layers.attention import Attention
from tfgrow.layers.growable import Channelwise
from tfgrow.layers.joins import Join, in_a_row, join_view
from tfgrow.layers.unsupported import unsupported
from tfgrow.types import ChannelMap

Owners = dict[int, ChannelMap]
"""Index of a producer's node -> where its channels lie on some tensor's last axis."""


class Flow:
    """The channels of a graph's mixing layers, followed through it.

    Attributes:
      sizes: tensor id -> length of its last axis; None where that is unknown.
    """

    def __init__(
        self, graph: Graph, widths: Mapping[int, int] | None = None, tied_as: Flow | None = None
    ):
        """Follows the channels.

        Args:
          graph: the traced model.
          widths: index of a producer's node -> its number of channels, if not the present one.
          tied_as: the flow at other widths that says which channels are tied. At the given ones it
            could look otherwise: one channel that is left of several is as wide as a gate's.
        """
        self.sizes: dict[int, int | None] = {}
        self._graph = graph
        self._widths = widths or {}
        self._owners: dict[int, Owners] = {}
        self._tied_as = tied_as
        self._parents: dict[int, int] = {}
        if tied_as is not None:
            roots = ((n.index, tied_as.root(n.index)) for n in graph.nodes if n.mixing)
            self._parents = {producer: root for producer, root in roots if producer != root}
        self._alike_by_chance: set[int] = set()
        self._reasons: dict[int, str] = {}
        self._coupled: dict[int, str] = {}
        for tensor, symbol in graph.tensors.items():
            self.sizes[tensor] = symbol.shape[-1] if len(symbol.shape) > 1 else None
        self._known: dict[int, Owners] | None = None
        for node in graph.nodes:
            self._visit(node)
        self._known = {}  # from now on, what is tied stays as it is
        for tensor in graph.outputs:
            for owner in self.at(tensor):
                self._block(
                    owner,
                    f"the channels of '{self.name(owner)}' reach the model's output unmixed",
                )
        if not self._widths:
            self._check_wider()

    def at(self, tensor: int) -> Owners:
        """Whose channels lie where on a tensor's last axis, by the first of the tied producers."""
        if self._known is not None and tensor in self._known:
            return self._known[tensor]
        found: Owners = {}
        for owner, at in self._owners.get(tensor, {}).items():
            root = self.root(owner)
            found[root] = _together(found[root], at) if root in found else at
        if self._known is not None:
            self._known[tensor] = found
        return found

    def root(self, producer: int) -> int:
        """The first of the producers that one is tied to."""
        while producer in self._parents:
            producer = self._parents[producer]
        return producer

    def tied(self, producer: int) -> list[Node]:
        """The producers that one is tied to, itself among them, in topological order."""
        return self._by_root[self.root(producer)]

    def readers(self, root: int) -> list[Node]:
        """The nodes that read channels of a root and of those tied to it, in topological order."""
        return self._by_channels.get(root, [])

    @functools.cached_property
    def _by_root(self) -> dict[int, list[Node]]:
        tied: dict[int, list[Node]] = {}
        for node in self._graph.nodes:
            if node.mixing:
                tied.setdefault(self.root(node.index), []).append(node)
        return tied

    @functools.cached_property
    def _by_channels(self) -> dict[int, list[Node]]:
        reading: dict[int, list[Node]] = {}
        for node in self._graph.nodes:
            for root in dict.fromkeys(root for tensor in node.inputs for root in self.at(tensor)):
                reading.setdefault(root, []).append(node)
        return reading

    def reason(self, producer: int) -> str | None:
        """Why a producer's channels can't be followed, or those of one it is tied to."""
        own = self._reasons.get(producer)
        if own is not None:
            return own
        for other in self.tied(producer):
            if other.index in self._reasons:
                return (
                    f"its channels are tied to those of '{other.name}', which can't grow: "
                    f"{self._reasons[other.index]}"
                )
        return None

    def coupled(self, producer: int) -> str | None:
        """The layer for which channels can only be doubled, all that are tied; None if none is."""
        found = (self._coupled.get(other.index) for other in self.tied(producer))
        return next((name for name in found if name is not None), None)

    def name(self, producer: int) -> str:
        return self._graph.nodes[producer].name

    def _check_wider(self) -> None:
        """Blocks what is tied while it is one channel wide, and would not be when wider."""
        for root in dict.fromkeys(self.root(owner) for owner in self._alike_by_chance):
            tied = [node.index for node in self.tied(root)]
            wider = Flow(self._graph, dict.fromkeys(tied, 2))
            for owner in tied:
                if owner in wider._reasons:
                    self._block(owner, wider._reasons[owner])

    def _block(self, owner: int, reason: str) -> None:
        self._reasons.setdefault(owner, reason)

    def _block_all(self, tensors, reason: str) -> None:
        """Blocks all whose channels lie on some tensors; `{}` stands for the producer's name."""
        for tensor in tensors:
            for owner in self._owners.get(tensor, {}):
                self._block(owner, reason.replace("{}", f"'{self.name(owner)}'"))

    def _visit(self, node: Node) -> None:
        if node.mixing:
            self._visit_mixing(node)
            return
        join = join_of(self._graph, node)
        if join is not None:
            self._visit_join(node, join)
            return
        view = registry.channelwise_view(node.operation)
        reason = _why_no_step(self._graph, node, view)
        if reason is not None or view is None:
            self._block_all(node.inputs, reason or "")
            return
        self._visit_channelwise(node, view)

    def _visit_mixing(self, node: Node) -> None:
        layer = node.operation
        width = self._widths.get(node.index, layer.growth_units)
        for tensor in node.outputs:
            self._owners[tensor] = {node.index: ChannelMap.identity(width)}
            self.sizes[tensor] = width
        reason = _why_no_consumer(self._graph, node)
        if reason is not None:
            self._block_all(node.inputs, reason)

    def _visit_channelwise(self, node: Node, view: Channelwise) -> None:
        (source,), target = node.inputs, node.outputs[0]
        shape = tuple(self._graph.tensors[source].shape)
        size = self.sizes[source]
        if size is None or len(node.outputs) != 1:
            self._block_all(node.inputs, f"the channels of {{}} pass '{node.name}' untraceably")
            return
        whole = ChannelMap.identity(size)
        if _flattens_unknown(self._graph, node, view):
            self._block_all(
                node.inputs,
                f"layer '{node.name}' flattens a tensor of unknown size {shape}; give the model's "
                "input a static shape",
            )
            return
        if view.over_channels:
            self._couple(node, source, size)
        self.sizes[target] = view.channel_map(whole, shape).size
        self._owners[target] = {
            owner: view.channel_map(at, shape) for owner, at in self._owners.get(source, {}).items()
        }

    def _couple(self, node: Node, tensor: int, size: int) -> None:
        """Notes that all channels of a tensor can only be doubled together."""
        owners = self.at(tensor)
        if len(owners) == 1 and next(iter(owners.values())).index.size == size:
            layer = f"'{node.name}' ({type(node.operation).__name__})"
            self._coupled.update(dict.fromkeys(owners, layer))
            return
        self._block_all(
            [tensor],
            f"the channels of {{}} reach '{node.name}' ({type(node.operation).__name__}), which "
            "normalises over them and over channels of other layers, or of ones that can't grow",
        )

    def _visit_join(self, node: Node, join: Join) -> None:
        (target,) = node.outputs
        if any(self.sizes[tensor] is None for tensor in node.inputs):
            self._block_all(node.inputs, f"the channels of {{}} pass '{node.name}' untraceably")
        elif join.ties:
            self._tie(node, target)
        else:
            self.sizes[target] = sum(self.sizes[tensor] or 0 for tensor in node.inputs)
            self._owners[target] = {}
            every = dict.fromkeys(owner for tensor in node.inputs for owner in self.at(tensor))
            for owner in every:
                parts = [(self.sizes[t] or 0, self.at(t).get(owner)) for t in node.inputs]
                row = in_a_row(parts)
                if row is not None:
                    self._owners[target][owner] = row

    def _tie(self, node: Node, target: int) -> None:
        wide = tied_inputs(self._tied_as or self, node)
        narrow = [tensor for tensor in node.inputs if tensor not in wide]
        self._block_all(
            narrow, f"the one channel of {{}} is spread by '{node.name}' over those of others"
        )
        ranks = {len(self._graph.tensors[tensor].shape) for tensor in node.inputs}
        if len(ranks) > 1:
            self._block_all(
                wide, f"the channels of {{}} meet tensors of another rank in '{node.name}'"
            )
        if self._tied_as is None:
            self._tie_all(node, wide)
        self.sizes[target] = max(self.sizes[tensor] or 0 for tensor in wide)
        self._owners[target] = {o: at for tensor in wide for o, at in self.at(tensor).items()}

    def _tie_all(self, node: Node, wide: list[int]) -> None:
        for tensor in wide:
            for owner, at in list(self.at(tensor).items()):
                if at.units == 1 and at.blocks > 1:
                    self._alike_by_chance.add(owner)
                for other in wide:
                    self._tie_to(node, self.root(owner), at, other)

    def _tie_to(self, node: Node, owner: int, at: ChannelMap, tensor: int) -> None:
        for other, place in self.at(tensor).items():
            if place.index.shape == at.index.shape and (place.index == at.index).all():
                first, second = sorted((owner, other))
                if first != second:
                    self._parents[second] = first
                return
        maker = self._graph.maker(tensor)
        whose = f"those that '{maker.name}' makes" if maker else "those of the model's input"
        self._block(
            owner,
            f"'{node.name}' ties the channels of '{self.name(owner)}' to {whose}, which are of "
            "several layers or can't grow",
        )


def _together(first: ChannelMap, second: ChannelMap) -> ChannelMap:
    """Where channels lie that were tied after they had come to lie beside each other."""
    index = np.concatenate([first.index, second.index], axis=1)
    return ChannelMap(np.sort(index, axis=1), first.size)


def join_of(graph: Graph, node: Node) -> Join | None:
    """A node as a join of several tensors, or None if it isn't one."""
    return join_view(node.operation, graph.tensors[node.outputs[0]]) if node.inputs[1:] else None


def tied_inputs(flow: Flow, node: Node) -> list[int]:
    """Those inputs of an elementwise join whose channels are tied: not one spread over others."""
    widest = max(flow.sizes[tensor] or 0 for tensor in node.inputs)
    return [tensor for tensor in dict.fromkeys(node.inputs) if flow.sizes[tensor] == widest]


def _why_no_consumer(graph: Graph, node: Node) -> str | None:
    """Why a mixing layer can't read more channels; `{}` stands for the producer's name."""
    consumer = node.operation
    reason = why_shared(graph, consumer) or registry.consumer_blocked(consumer)
    if reason:
        return f"the channels of {{}} reach a blocked consumer: {reason}"
    if not consumer.trainable:
        return (
            f"the channels of {{}} reach layer '{consumer.name}', which is frozen (trainable=False)"
        )
    return None


def _why_no_step(graph: Graph, node: Node, view: Channelwise | None) -> str | None:
    """Why channels can't be followed through a layer; `{}` stands for the producer's name."""
    layer = node.operation
    if view is not None and len(node.inputs) == 2 and takes_mask(layer):
        return (
            f"the channels of {{}} reach layer '{layer.name}' ({type(layer).__name__})"
            ", which reads a mask (of Masking or Embedding(mask_zero=True)) beside them: paths are "
            "followed unmasked"
        )
    if view is None or len(node.inputs) != 1:
        kind = type(layer).__name__
        return f"the channels of {{}} reach '{node.name}' ({kind}), " + _why_not_channelwise(layer)
    reason = registry.blocked_reason(layer)
    # What has neither weights nor a shape to adapt may be called as often as one likes.
    if reason is None and (getattr(layer, "weights", None) or _adapts(graph, node, view)):
        reason = why_shared(graph, layer)
    return f"on the path of {{}}: {reason}" if reason else None


def _adapts(graph: Graph, node: Node, view: Channelwise) -> bool:
    size = graph.tensors[node.inputs[0]].shape[-1]
    return size is not None and bool(view.resized_attributes(size))


def why_shared(graph: Graph, layer) -> str | None:
    """Why a layer that is used in several places can't change; None of one that isn't."""
    calls = len(graph.calls(layer))
    if calls > 1:
        return f"layer '{layer.name}' is shared: it is called {calls} times"
    tie = graph.ties.get(id(layer))
    return str(tie) if tie else None


def _flattens_unknown(graph: Graph, node: Node, view: Channelwise) -> bool:
    shape = tuple(graph.tensors[node.inputs[0]].shape)
    output_shape = graph.tensors[node.outputs[0]].shape
    if len(output_shape) >= len(shape) or None not in shape[1:]:
        return False
    known = tuple(2 if size is None else size for size in shape)
    return view.channel_map(ChannelMap.identity(1), known).blocks != 1


def _why_not_channelwise(layer) -> str:
    if isinstance(layer, Attention):
        return "an attention layer, which reads all channels of what it attends to: they can't grow"
    if known := unsupported(layer):
        return known
    if registry.growable_class(layer) is not None:
        return "a stock layer; make the model growable with tfgrow.convert(model)"
    reason = "which mixes channels or is unknown to tfgrow"
    if not isinstance(layer, keras.layers.Layer):
        return reason
    return (
        f"{reason}; if it treats every channel by itself, declare its class with "
        "tfgrow.layers.register_channelwise, or register_join if it has several inputs, and if it "
        "has weights, make it a tfgrow.Growable"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Descent:
    """How the positions of a resized axis descend from those it had.

    Attributes:
      source: int array `[new_size]`, an old position, or -1.
      places: by producer, where its channels lie afterwards.
    """

    source: np.ndarray
    places: Owners


def descend(before: Owners, after: Owners, sizes: tuple[int, int], parents: Mapping) -> Descent:
    """Follows the positions of an axis through an edit of some producers' channels.

    Args:
      before: whose channels lie where.
      after: the same after the edit.
      sizes: length of the axis before and after.
      parents: by producer that is edited, int array `[channels afterwards]`, the old channel that
        each descends from, or -1.
    """
    old_rest, new_rest = np.ones(sizes[0], bool), np.ones(sizes[1], bool)
    source = np.full(sizes[1], -1, dtype=np.int64)
    for owner, place in after.items():
        old = before[owner].index
        mine = np.asarray(parents.get(owner, np.arange(len(old))))
        source[place.index] = np.where((mine >= 0)[:, None], old[np.maximum(mine, 0)], -1)
        old_rest[old], new_rest[place.index] = False, False
    source[new_rest] = np.flatnonzero(old_rest)  # what nobody's channels are stays as it is
    return Descent(source, after)
