"""Skip: a new connection from an earlier tensor to a later one of the same resolution.

A projection of the earlier one, which starts at zero, is added to the later one. The projection has
a closed form: nothing else is to be learned.

Source: residual connections of He et al. 2016 (arXiv 1512.03385) with projections that start at
zero; the closed form as in `morphisms/branch.py`.
"""

from __future__ import annotations

import numpy as np

from tfgrow.capture.execute import tensor_tap
from tfgrow.graph.nodes import Graph, Node
from tfgrow.layers.conv import CONVOLUTIONS
from tfgrow.layers.dense import Dense
from tfgrow.morphisms.base import Candidate
from tfgrow.morphisms.branch import (
    Branch,
    Branching,
    ends_of,
    flops_at,
    is_convolved,
    maker_of,
    once_per_site,
)
from tfgrow.types import BranchEdit, Cost, Demand, NewLayer

SOURCES = 2
"""How many earlier tensors are tried per place, the nearest ones."""

MOST_CHANNELS = 2304
"""Of tensors of more channels, no projection is tried: their correlations fill the memory."""


class Skip(Branch):
    """Adds a projection of an earlier tensor. See the module's docstring."""

    name = "skip"

    @once_per_site
    def branchings(self, site):
        if site.blocked is not None:
            return []
        found = []
        for target, tensor in ends_of(site):
            shape = tuple(site.graph.tensors[tensor].shape)
            for source, read in _sources(site.graph, target, tensor)[:SOURCES]:
                channels = int(site.graph.tensors[read].shape[-1])
                found.append(Branching(source, target, read, tensor, shape, channels))
        return found

    def candidates(self, site, *, new_units, seed):
        del new_units, seed
        return [
            Candidate(
                site,
                self.name,
                number,
                {"last": np.zeros((place.channels, int(place.shape[-1])), "float32")},
                {},
                Cost(),
            )
            for number, place in enumerate(self.branchings(site))
        ]

    def demand(self, candidate):
        place = self.branchings(candidate.site)[candidate.unit]
        weights = candidate.theta["last"].size
        cost = Cost(weights, flops_at(place, weights))
        return Demand(more=cost, fixed=(place.read, place.changed))

    def scale(self, site, units):
        del site, units
        return {}

    def features(self, capture, branching, theta):
        del theta
        return capture.values[tensor_tap(branching.read)]

    def edit(self, candidate):
        place = self.branchings(candidate.site)[candidate.unit]
        kernel = candidate.theta["last"]
        config = {"use_bias": False, "name": f"skip_{place.source.name}_{place.target.name}"}
        kind: type = Dense
        if is_convolved(candidate.site) and len(place.shape) > 2:
            kind = CONVOLUTIONS[len(place.shape)]
            config |= {"filters": kernel.shape[1], "kernel_size": 1}
            kernel = kernel.reshape(*[1] * (len(place.shape) - 2), *kernel.shape)
        else:
            config |= {"units": kernel.shape[1]}
        layer = NewLayer(kind, config, (kernel,), (np.zeros_like(kernel),))
        return BranchEdit(candidate.site, place.source.name, place.target.name, (layer,))


def _sources(graph: Graph, target: Node, tensor: int) -> list[tuple[Node, int]]:
    """Earlier tensors that mixing layers read, of the target's resolution; the nearest first."""
    upstream: set[int] = set()
    stack = [target]
    while stack:
        for read in stack.pop().inputs:
            node = graph.maker(read)
            if node is not None and node.index not in upstream:
                upstream.add(node.index)
                stack.append(node)
    shape = graph.tensors[tensor].shape
    read_by_mixing = dict.fromkeys(n.inputs[0] for n in graph.nodes if n.mixing)
    found = []
    for read in read_by_mixing:
        node = maker_of(graph, read)
        known = graph.tensors[read].shape
        fits = tuple(known[:-1]) == tuple(shape[:-1]) and (known[-1] or np.inf) <= MOST_CHANNELS
        if node is not None and node.index in upstream and fits:
            found.append((node, read))
    return sorted(found, key=lambda pair: -pair[0].index)
