"""Which new units came to life: late-born ones often stay inactive (arXiv 2509.18842)."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from tfgrow.capture.batches import batches_of
from tfgrow.capture.capture import observe
from tfgrow.capture.execute import attention_call, float32_compute, tensor_tap
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import sites_of

ALIVE = 1e-3
"""A unit is alive if its values vary by more than this share of what its site's units do."""


def alive_share(model: keras.Model, newborn: Mapping[str, int], dataset) -> float:
    """Share of the youngest units that are active.

    A unit is active if the standard deviation of what it hands to its consumers, over samples and
    positions, is more than `ALIVE` times the median of its site's units.

    Args:
      model: the grown model.
      newborn: site name -> number of units added last, which are the site's last ones.
      dataset: a few batches.
    """
    graph = trace(model)
    sites = [site for site in sites_of(model, graph) if newborn.get(site.name)]
    alive = total = 0
    for site, deviation in zip(sites, _deviations(model, graph, sites, dataset), strict=True):
        young = deviation[-newborn[site.name] :]  # all, if there are fewer: some may be gone
        alive += int(np.sum(young > ALIVE * np.median(deviation)))
        total += len(young)
    return alive / total if total else 1.0


def _deviations(model, graph, sites, dataset) -> list[np.ndarray]:
    """Per site, its units' standard deviations, summed over consumers: `[units]`."""
    known: list[dict[str, _Moments]] = [{} for _ in sites]
    for x, _, _ in batches_of(dataset):
        with float32_compute(model):
            values = observe(graph, x).values
        for moments, site in zip(known, sites, strict=True):
            if site.heads_blocked is None:
                parts = _parts_of_heads(site, values)
                moments.setdefault("heads", _Moments(kept=2)).add(parts)
            for number, leaf in enumerate(site.leaves):
                value = values[tensor_tap(leaf.tensor)]
                moments.setdefault(f"leaf/{number}", _Moments()).add(value)
    return [_of_units(site, moments) for site, moments in zip(sites, known, strict=True)]


def _of_units(site, moments: Mapping[str, _Moments]) -> np.ndarray:
    total = np.zeros(site.units)
    if "heads" in moments:
        total += moments["heads"].deviation().max(axis=1)
    for number, leaf in enumerate(site.leaves):
        deviation = moments[f"leaf/{number}"].deviation()
        total += deviation[leaf.channels.index].max(axis=1)
    return total


class _Moments:
    """The standard deviation over batches, and all but the last axes of what they hold.

    Args:
      kept: how many axes are kept.
    """

    def __init__(self, kept: int = 1):
        self._kept = kept
        self._count = 0
        self._sum = self._squares = np.float64(0.0)

    def add(self, value) -> None:
        """Another batch."""
        axes = list(range(len(value.shape) - self._kept))
        value = tf.cast(value, tf.float64)
        self._count += int(np.prod([value.shape[axis] for axis in axes]))
        self._sum = self._sum + tf.reduce_sum(value, axes).numpy()
        self._squares = self._squares + tf.reduce_sum(value**2, axes).numpy()

    def deviation(self) -> np.ndarray:
        """By what is kept."""
        mean = self._sum / self._count
        return np.sqrt(np.maximum(self._squares / self._count - mean**2, 0.0))


def _parts_of_heads(site, values):
    """What each unit of an attention layer adds to its output, `[N, T, units, outputs]`."""
    layer = site.producer
    contexts = layer.contexts(attention_call(site.node, values), layer.unit_weights())
    return tf.einsum("btnd,ndo->btno", contexts, layer.unit_projections())
