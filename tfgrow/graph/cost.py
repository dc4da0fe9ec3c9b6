"""Parameters and inference FLOPs of a model, at its present and at hypothetical widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tfgrow.graph.heads import call_of
from tfgrow.graph.nodes import Graph
from tfgrow.graph.sites import Site
from tfgrow.layers.attention import Attention
from tfgrow.layers.growable import Growable, Mixing
from tfgrow.types import Cost

_NO_KERNELS: Mapping[str, tuple[int, ...]] = {}


class CostModel:
    """Counts what a model costs when its sites have some units more.

    Parameters are all weights, trainable or not, as `model.count_params()` counts them. FLOPs are
    those of the weights of mixing and depthwise layers and of attention per sample, a multiply-add
    counting as 2, at every call of a layer; element-wise work is left out.
    """

    def __init__(self, graph: Graph, sites: Sequence[Site]):
        self._layers: dict[int, tuple[Growable, dict, list]] = {}
        self._cache: dict[tuple, Cost] = {}
        fan_in, fan_out, channel = _extras(sites)
        self._heads: dict[str, tuple[int, Cost, int]] = {}
        for node in graph.nodes:
            layer = node.operation
            if isinstance(layer, Attention):
                now, unit, rest = _cost_of_heads(layer, call_of(node, graph.tensors))
                if layer.name in self._heads:  # another call costs FLOPs, no parameters
                    before = self._heads[layer.name][1].flops
                    unit = Cost(unit.params, before + unit.flops)
                self._heads[layer.name] = now, unit, rest
                continue
            if not isinstance(layer, Growable):
                continue
            if id(layer) not in self._layers:
                extra = {
                    name: {
                        "fan_in": fan_in.get(id(layer), []),
                        "fan_out": fan_out.get(id(layer), []),
                        "channel": channel.get((id(layer), name), []),
                    }
                    for name in layer.growable_variables()
                }
                self._layers[id(layer)] = layer, extra, []
            _, _, shapes = self._layers[id(layer)]  # of what it makes at each of its calls
            shapes.append(graph.tensors[node.outputs[0]].shape)
        self.base = self._count({}, {})

    def extra(
        self,
        units: Mapping[str, int],
        kernels: Mapping[str, tuple[int, ...]] = _NO_KERNELS,
    ) -> Cost:
        """What the model costs more than now.

        Args:
          units: site name -> number of units added.
          kernels: layer name -> its new `kernel_size`.
        """
        wider = tuple(sorted((name, count) for name, count in units.items() if count))
        key = (wider, tuple(sorted(kernels.items())))
        if key not in self._cache:
            total = self._count(units, kernels)
            self._cache[key] = Cost(total.params - self.base.params, total.flops - self.base.flops)
        return self._cache[key]

    def _count(self, units, kernels) -> Cost:
        params = flops = 0
        for layer, extra, shapes in self._layers.values():
            sizes = {
                name: _size(layer, name, terms, units, kernels.get(layer.name))
                for name, terms in extra.items()
            }
            params += sum(sizes.values())
            per_weight = sum(_flops_per_weight(layer, shape) for shape in shapes)
            flops += sizes.get(layer.kernel_name, 0) * per_weight
        for name, (now, unit, rest) in self._heads.items():
            heads = now + units.get(name, 0)
            params += heads * unit.params + rest
            flops += heads * unit.flops
        return Cost(params, flops)


def model_flops(graph: Graph) -> int:
    """Inference FLOPs per sample of a model as it is."""
    return CostModel(graph, ()).base.flops


def _cost_of_heads(layer: Attention, called) -> tuple[int, Cost, int]:
    """An attention layer's units now, what each costs, and its parameters that are no unit's."""
    unit, units = Cost(*layer.unit_cost(called)), layer.attention_units
    every = sum(int(np.prod(v.shape)) for v in layer.growable_variables().values())
    return units, unit, every - units * unit.params


def _extras(sites: Sequence[Site]) -> tuple[dict, dict, dict]:
    """By layer id, which sites widen which of its axes, and by how many entries per unit.

    Channels that pass through a layer are told by the names of its variables too.
    """
    fan_in: dict[int, list] = {}
    fan_out: dict[int, list] = {}
    channel: dict[tuple[int, str], list] = {}
    for site in sites:
        if not site.widens:
            continue
        for node in site.producers:
            fan_out.setdefault(id(node.operation), []).append((site.name, 1))
        for step in site.steps:
            own = step.layer.growable_variables() if isinstance(step.layer, Growable) else ()
            for name in own:
                blocks = step.view.variable_map(name, step.incoming).blocks
                channel.setdefault((id(step.layer), name), []).append((site.name, blocks))
        for leaf in site.leaves:
            for node in leaf.consumers:
                terms = fan_in.setdefault(id(node.operation), [])
                terms.append((site.name, leaf.channels.blocks))
    return fan_in, fan_out, channel


def _size(layer: Growable, name: str, terms: Mapping[str, list], units, kernel_size) -> int:
    """Entries of a variable with `units` (site name -> number) added, and a larger kernel."""
    shape = list(getattr(layer, name).shape)
    if kernel_size is not None and name == "kernel":
        shape[: len(kernel_size)] = kernel_size
    for kind, widened in terms.items():
        axis = getattr(layer.variable_axes[name], kind)
        if axis is not None:
            shape[axis] += sum(blocks * units.get(site, 0) for site, blocks in widened)
    return int(np.prod(shape, dtype=np.int64))


def _flops_per_weight(layer, output_shape) -> int:
    if isinstance(layer, Mixing):
        return layer.flops_per_weight(output_shape)
    positions = [int(size) for size in output_shape[1:-1] if size is not None]
    return 2 * int(np.prod(positions, dtype=np.int64))
