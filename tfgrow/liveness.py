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
    """Per site, its units' standard deviations, summed over batches and consumers: `[units]`."""
    sums = [np.zeros(site.units) for site in sites]
    for x, _, _ in batches_of(dataset):
        with float32_compute(model):
            values = observe(graph, x).values
        for total, site in zip(sums, sites, strict=True):
            if site.heads_blocked is None:
                total += _deviation(_parts_of_heads(site, values), kept=2).max(axis=1)
            for leaf in site.leaves:
                deviation = _deviation(values[tensor_tap(leaf.tensor)])
                total += deviation[leaf.channels.index].max(axis=1)
    return sums


def _deviation(value, kept: int = 1) -> np.ndarray:
    """Standard deviation over all but the last axes."""
    return tf.math.reduce_std(value, list(range(len(value.shape) - kept))).numpy()


def _parts_of_heads(site, values):
    """What each unit of an attention layer adds to its output, `[N, T, units, outputs]`."""
    layer = site.producer
    contexts = layer.contexts(attention_call(site.node, values), layer.unit_weights())
    return tf.einsum("btnd,ndo->btno", contexts, layer.unit_projections())
