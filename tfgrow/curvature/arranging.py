"""Batches as the passes over them take them: checked, and arranged by output."""

from __future__ import annotations

import functools
from typing import Any

import keras
import tensorflow as tf

from tfgrow._keras import mask_of
from tfgrow.capture.batches import Batch
from tfgrow.capture.capture import prepare_inputs
from tfgrow.capture.checks import check_batch
from tfgrow.capture.execute import execute, float32_compute, tensor_tap
from tfgrow.capture.tracing import traced_anew
from tfgrow.curvature.total_loss import TotalLoss
from tfgrow.graph.nodes import Graph


class Arranging:
    """Checks batches of one model and loss, and gives them targets and weights by part.

    Positions that a mask on an output leaves out (a padded sequence behind `Masking` or
    `Embedding(mask_zero=True)`) weigh nothing, and the others so much more, as in `fit`.

    Args:
      model: the model.
      graph: its graph.
      loss: its loss.
    """

    def __init__(self, model: keras.Model, graph: Graph, loss: TotalLoss):
        self._model = model
        self._graph = graph
        self._loss = loss

    def __call__(self, batch: Batch) -> Batch:
        """The batch as `TotalLoss.arranged` makes it.

        Raises:
          ValueError: if it doesn't fit model or loss.
        """
        arranged = self._loss.arranged(batch)
        x, targets, weights = check_batch(self._model, self._graph, arranged, self._loss.labels)
        if not self._with_mask:
            return x, targets, weights
        with float32_compute(self._model):
            masks = self._masks(x)
        weights = list(weights)
        for number, mask in zip(self._with_mask, masks, strict=True):
            weights[number] = _masked(weights[number], mask)
        return x, targets, tuple(weights)

    @functools.cached_property
    def _with_mask(self) -> list[int]:
        """The parts whose outputs have a mask."""
        outputs = [self._output(number) for number in range(len(self._loss.parts))]
        masks = [mask_of(self._graph.tensors[output]) for output in outputs]
        return [number for number, mask in enumerate(masks) if mask is not None]

    def _output(self, number: int) -> int:
        return self._graph.outputs[self._loss.parts[number].output]

    @functools.cached_property
    def _masks(self) -> Any:
        """From inputs to masks; of the graph that is traced only what they hang on is run."""

        def masks(x):
            values = execute(self._graph, prepare_inputs(self._graph, x))
            return [mask_of(values[tensor_tap(self._output(number))]) for number in self._with_mask]

        return traced_anew(masks)


def _masked(weights: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Weights of samples, or of positions, times a mask's share of all: its mean becomes 1."""
    mask = tf.cast(mask, tf.float32)
    for _ in range(mask.shape.rank - weights.shape.rank):
        weights = weights[..., None]
    return weights * tf.math.divide_no_nan(mask, tf.reduce_mean(mask))
