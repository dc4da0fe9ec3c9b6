"""Checks of batches before anything is computed on them, and of the loss after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrow.capture.batches import Batch
from tfgrow.capture.capture import flat_inputs
from tfgrow.graph.nodes import Graph


def check_batch(
    model: Any, graph: Graph, batch: Batch, labels: Sequence[tuple[str, range | None]]
) -> Batch:
    """The batch, if it fits the model.

    Args:
      model: named in errors.
      graph: the model's graph.
      batch: `(x, targets, weights)`, a target and a weight per output that has a loss.
      labels: of those outputs, the name and the class indices that targets may hold; None if
        targets are no indices.

    Raises:
      ValueError: inputs of another number or shape, negative weights, labels that are no class.
    """
    x, targets, weights = batch
    _check_inputs(model, graph, flat_inputs(graph, x))
    for weight in weights:
        if float(tf.reduce_min(weight)) < 0:
            raise ValueError(
                f"Sample weights must be >= 0; found {float(tf.reduce_min(weight))}: the estimate "
                "takes their square root."
            )
    for y, (key, classes) in zip(targets, labels, strict=True):
        if classes is not None:
            of = f" of output '{key}'" if len(graph.outputs) > 1 else ""
            _check_labels(model, y, classes, of)
    return batch


def _check_labels(model, y, classes: range, of: str) -> None:
    y = tf.cast(y, tf.float32)  # they may be bool
    low, high = float(tf.reduce_min(y)), float(tf.reduce_max(y))
    if low < classes.start or high >= classes.stop:
        raise ValueError(
            f"The targets{of} hold the labels {low:g} to {high:g}, but model '{model.name}' has "
            f"outputs for the classes {classes.start} to {classes.stop - 1}."
        )


def _check_inputs(model, graph: Graph, flat) -> None:
    expected = [graph.tensors[tensor] for tensor in graph.inputs]
    if len(flat) != len(expected):
        raise ValueError(
            f"The dataset gives {len(flat)} inputs, model '{model.name}' takes {len(expected)}."
        )
    for value, reference in zip(flat, expected, strict=True):
        known = [size for size in reference.shape[1:] if size is not None]
        short = value.shape.rank == 1 and known == [1]
        if not short and value.shape.rank and _fit(reference.shape[1:], value.shape):
            raise ValueError(
                f"The dataset gives single samples of shape {tuple(value.shape)}: batch it, "
                "dataset.batch(32)."
            )
        if not short and not _fit(reference.shape[1:], value.shape[1:]):
            raise ValueError(
                f"The dataset's samples have shape {tuple(value.shape[1:])}, but input "
                f"'{reference.name}' of model '{model.name}' expects {tuple(reference.shape[1:])}."
            )


def _fit(expected: Sequence[int | None], found: Sequence[int]) -> bool:
    """Whether a shape is one that is expected."""
    pairs = zip(expected, found, strict=False)
    return len(expected) == len(found) and all(size in (None, other) for size, other in pairs)


def check_loss(value: Any) -> None:
    """Raises ValueError for a loss that is not finite."""
    if not np.isfinite(np.asarray(value)).all():
        raise ValueError(
            f"The loss on the estimation data is not finite ({np.asarray(value)}). Check the "
            "data for NaN, or lower the learning rate of the training before growing."
        )
