"""The truth that estimates are held against: the model's own forward pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import keras
import tensorflow as tf

from tfgrow.capture.batches import batches_of, check_finite, size_of_batch
from tfgrow.capture.checks import check_loss
from tfgrow.capture.execute import float32_compute
from tfgrow.capture.tracing import traced_anew
from tfgrow.curvature.arranging import Arranging
from tfgrow.estimator import compiled_loss, total_loss
from tfgrow.graph.convert import copy_model
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import find_sites
from tfgrow.growth import checked
from tfgrow.morphisms.base import Candidate
from tfgrow.morphisms.registry import get
from tfgrow.surgery.apply import apply_edits
from tfgrow.surgery.transaction import growth_transaction


def real_loss(model: keras.Model, dataset, loss=None, loss_weights=None) -> float:
    """Mean loss per sample of the model itself, called in inference mode.

    Args:
      model: any built model.
      dataset: finite, anything `model.fit` takes, with targets.
      loss: as `model.compile` takes it; by default the compiled one with its `loss_weights`. Weight
        penalties are not part of it.
      loss_weights: of the outputs' losses, to go with `loss`.
    """
    check_finite(dataset)
    graph = trace(model)
    total_of = total_loss(model, graph, loss, loss_weights)
    arranged = Arranging(model, graph, total_of)

    def batch_loss(x, y, weights):
        every = keras.tree.flatten(model(x, training=False))
        outputs = [every[part.output] for part in total_of.parts]
        loss = total_of.value_at_outputs(y, outputs, weights)
        # Keras clips probabilities, and NaN with them, to finite losses
        finite = [tf.reduce_all(tf.math.is_finite(output)) for output in outputs]
        return tf.where(tf.reduce_all(finite), loss, math.nan)

    total = count = 0.0
    traced = traced_anew(batch_loss)
    with float32_compute(model):  # rounding to half precision would drown what is measured
        batches = batches_of(dataset)
        first = list(itertools.islice(batches, 2))
        # Of deep models, tracing takes several times as long as a batch.
        loss_of = traced if len(first) > 1 else batch_loss
        for batch in itertools.chain(first, batches):
            total += float(loss_of(*arranged(batch)))
            count += size_of_batch(batch)
    return total / count


def measure_change(
    model: keras.Model,
    candidates: Sequence[Candidate] | Candidate,
    dataset,
    loss=None,
    loss_weights=None,
    in_place: bool = False,
    loss_before: float | None = None,
) -> float:
    """The true change of the mean loss when candidates are really applied, to a copy.

    Args:
      model: the growable model; it is left as it is.
      candidates: learned candidates of it.
      dataset: finite, anything `model.fit` takes, with targets.
      loss: as `model.compile` takes it; by default the compiled one with its `loss_weights`.
      loss_weights: of the outputs' losses, to go with `loss`.
      in_place: whether the model itself is expanded and put back, which of large models takes a
        fraction of the time that a copy takes. Nothing else may use the model meanwhile.
      loss_before: what `real_loss` says of the model on this dataset, where many sets of candidates
        are measured; None measures it.

    Returns:
      Loss of the expanded copy minus loss of the model, on the same samples; negative is better.

    Raises:
      ValueError: if the candidates are of another model, or of this one before it last grew.

    Example:

    >>> import keras, numpy as np, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu"), keras.layers.Dense(2)]))
    >>> model.compile("sgd", "mse")
    >>> data = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    >>> new_unit = tfgrow.candidates(model, "add", new_units=1)  # not learned: nothing changes
    >>> abs(tfgrow.measure_change(model, new_unit, data)) < 1e-6
    True
    >>> model.layers[0].units
    3
    """
    chosen = checked(model, candidates)
    if loss is None and loss_weights is None:
        loss, loss_weights = compiled_loss(model)
    before = loss_before
    if before is None:
        before = real_loss(model, dataset, loss, loss_weights)
    check_loss(before)
    if in_place:
        edits = [get(candidate.morphism).edit(candidate) for candidate in chosen]
        with growth_transaction(model) as trial:
            apply_edits(model, edits)
            after = real_loss(model, dataset, loss, loss_weights)
            trial.rollback()
        return after - before
    copy = copy_model(model, compiled=False)
    sites = {site.name: site for site in find_sites(copy)}
    moved = [candidate.replace(site=sites[candidate.site.name]) for candidate in chosen]
    apply_edits(copy, [get(candidate.morphism).edit(candidate) for candidate in moved])
    return real_loss(copy, dataset, loss, loss_weights) - before
