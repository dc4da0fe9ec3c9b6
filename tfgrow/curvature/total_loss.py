"""The loss of a whole model: the sum of what its outputs cost.

Output o has the logits z_o and the loss l_o, a mean over samples times the loss weight of the
output. The Gauss-Newton matrix of the sum is block diagonal over the outputs' logits: it is
`sum_o J_o' H_o J_o`, so that a column belongs to one output and is zero at the others.

Targets, weights and logits are sequences with an entry per output that has a loss (a *part*).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfgrow._keras import logits_behind
from tfgrow.capture.batches import Batch
from tfgrow.capture.capture import Cotangents, Head, find_head
from tfgrow.curvature.by_output import losses_by_output, values_by_output, weights_by_output
from tfgrow.curvature.columns import weigh_columns, weigh_values
from tfgrow.curvature.loss_head import (
    AUTO_EXACT_COLUMNS,
    Curvature,
    LossHead,
    make_loss_head,
    resolve_curvature,
)
from tfgrow.curvature.loss_matching import hides_logits
from tfgrow.graph.nodes import Graph


@dataclasses.dataclass(frozen=True, eq=False)
class OutputLoss:
    """What one output adds to the loss.

    Attributes:
      key: the output's name.
      output: its position among the model's outputs.
      head: where its logits are.
      at_logits: its loss as a function of them.
      at_output: its loss as a function of what the model gives.
      weight: its loss weight.
      curvature: how the Hessian at its logits is made up of columns.
      labels: the class indices that its targets may hold; None if they are no class indices.
    """

    key: str
    output: int
    head: Head
    at_logits: LossHead
    at_output: LossHead
    weight: float
    curvature: Curvature
    labels: range | None

    @property
    def reweighted(self) -> bool:
        """Whether the empirical curvature stands for a Hessian that is zero almost everywhere."""
        return self.curvature == "empirical" and self.at_logits.row_loss.piecewise_linear

    def of_output(self, output: tf.Tensor) -> tuple[LossHead, tf.Tensor]:
        """The loss and what it reads, given a tensor that the model gave.

        As in `fit` that is the logits, if Keras tells them: the losses of probabilities are clipped
        at 1e-7, so that they don't see what happens to samples that are wrong for sure.
        """
        logits = logits_behind(output) if hides_logits(self.head.activation) else None
        read, head = (output, self.at_output) if logits is None else (logits, self.at_logits)
        return head, tf.cast(read, tf.float32)

    def column_of(self, gradient: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        """The empirical column, from the gradient of each sample's weighted loss anywhere."""
        if weight.shape.rank > 1:  # the gradient itself, as weights of positions are in it
            return gradient if self.weight == 1.0 else gradient / max(self.weight, 1e-30) ** 0.5
        shape = (-1, *[1] * (len(gradient.shape) - 1))
        return tf.math.divide_no_nan(gradient, tf.reshape(tf.sqrt(weight), shape))

    def empirical_column(self, y: tf.Tensor, z: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        """The only column of the empirical curvature, at the logits.

        Where the Hessian is zero the square of the gradient has not its scale: it would depend on
        the unit that targets are measured in. What is right at the size r of the errors is the
        curvature 1/r of reweighted least squares (|z| = z^2/|z|), r being the batch's mean loss.
        """
        gradient = _weighted_gradient(self, y, z, weight)
        column = self.column_of(gradient, weight)
        if not self.reweighted:
            return column
        axes = list(range(1, len(gradient.shape)))
        # of one number 1; of a mean over n numbers, whose squares are too small for it, root of n
        numbers = tf.math.divide_no_nan(
            tf.reduce_sum(tf.abs(gradient), axes, keepdims=True),
            tf.sqrt(tf.reduce_sum(gradient**2, axes, keepdims=True)),
        )
        errors = tf.sqrt(tf.reduce_mean(self.at_logits.per_sample(y, z)))
        return tf.math.divide_no_nan(column * numbers, errors)


@dataclasses.dataclass(frozen=True, eq=False)
class TotalLoss:
    """The loss of a model, as a function of its logits.

    Attributes:
      parts: the outputs that have a loss.
      keys: the names of all outputs.
    """

    parts: tuple[OutputLoss, ...]
    keys: tuple[str, ...]

    @property
    def heads(self) -> list[Head]:
        """Where the logits are."""
        return [part.head for part in self.parts]

    @property
    def labels(self) -> list[tuple[str, range | None]]:
        """By name of the output, the class indices that its targets may hold."""
        return [(part.key, part.labels) for part in self.parts]

    @property
    def curvature(self) -> str | tuple[str, ...]:
        """The one of all parts, or each one's."""
        names = tuple(part.curvature for part in self.parts)
        return names[0] if len(set(names)) == 1 else names

    def curved(self) -> TotalLoss:
        """The same with the empirical curvature where the Hessian is zero almost everywhere."""
        parts = tuple(
            dataclasses.replace(part, curvature="empirical")
            if part.at_logits.row_loss.piecewise_linear
            else part
            for part in self.parts
        )
        return dataclasses.replace(self, parts=parts)

    @property
    def column_of_gradient(self) -> Callable | None:
        """How gradient and weights make the only column, where it needs no pass of its own."""
        first, *others = self.parts
        plain = first.curvature == "empirical" and not first.reweighted
        return first.column_of if plain and not others else None

    def arranged(self, batch: Batch) -> Batch:
        """A batch as `fit` takes it, with targets and weights by part.

        The loss weights become factors of the sample weights: all that follows heeds them so.

        Raises:
          ValueError: if targets or weights are missing, or there are too many.
        """
        x, y, weight = batch
        wanted = [part.output for part in self.parts]
        targets = values_by_output("targets", y, self.keys, wanted)
        missing = [p.key for p, target in zip(self.parts, targets, strict=True) if target is None]
        if missing:
            raise ValueError(
                f"The dataset gives no targets for the outputs {missing}, which have a loss; give "
                "them, or compile the model with None as their loss."
            )
        if tf.is_tensor(weight):
            weights = [weight] * len(self.parts)
        else:
            weights = values_by_output("sample weights", weight, self.keys, wanted)
        weights = [
            _times(part.weight, tf.ones(tf.shape(y)[:1]) if w is None else w)
            for part, y, w in zip(self.parts, targets, weights, strict=True)
        ]
        return x, tuple(targets), tuple(weights)

    def value(self, y: Sequence, logits: Sequence, weights: Sequence) -> tf.Tensor:
        """Sum of a batch's weighted losses."""

        def of_part(part, *args):
            return tf.reduce_sum(part.at_logits.per_sample(*args))

        return _sum(self._by_part(of_part, y, logits, weights))

    def value_at_outputs(self, y: Sequence, outputs: Sequence, weights: Sequence) -> tf.Tensor:
        """The same from what the model gives at the outputs of the parts."""

        def of_part(part, target, output, weight):
            head, read = part.of_output(output)
            return tf.reduce_sum(head.per_sample(target, read, weight))

        return _sum(self._by_part(of_part, y, outputs, weights))

    def per_sample(self, y: Sequence, logits: Sequence, weights: Sequence) -> tf.Tensor:
        """Each sample's weighted loss, `[N]`."""

        def of_part(part, *args):
            return part.at_logits.per_sample(*args)

        return _sum(self._by_part(of_part, y, logits, weights))

    def gradient(self, y: Sequence, logits: Sequence, weights: Sequence) -> list[tf.Tensor]:
        """Gradient of each sample's weighted loss with respect to the logits of each part."""
        return self._by_part(_weighted_gradient, y, logits, weights)

    def columns(
        self, y: Sequence, logits: Sequence, weights: Sequence, draws: int, seed: Any
    ) -> list[Cotangents]:
        """Columns of the Hessian of each sample's weighted loss, by number of the part.

        The columns of a part are zero at the others. Only those that are drawn go together, the
        n-th of every part: draws of different parts are independent and have zero mean, so that
        `sum_o J_o' h_o` times its transpose is `sum_o J_o' H_o J_o` in expectation all the same.
        """

        def of_part(part, target, z, weight, own_seed):
            if part.curvature == "empirical":
                return [part.empirical_column(target, z, weight)]
            factors = part.at_logits.factors(target, z, part.curvature, draws, own_seed)
            return weigh_columns(factors, weight)

        seeds = [_seed_of(seed, number) for number in range(len(self.parts))]
        columns = self._by_part(of_part, y, logits, weights, seeds)
        drawn, alone = {}, []
        for number, (part, own) in enumerate(zip(self.parts, columns, strict=True)):
            if part.curvature == "sampled":
                drawn[number] = own
            else:
                alone += [{number: column} for column in own]
        together = zip(*drawn.values(), strict=True)
        return [*(dict(zip(drawn, nth, strict=True)) for nth in together), *alone]

    def beyond(
        self, y: Sequence, logits: Sequence, products: tf.Tensor, weights: Sequence, draws: int
    ) -> tf.Tensor:
        """What the samples' losses change by along directions, beyond the second order: `[N, n]`.

        It is counted for the parts whose columns tell it, which are exact ones.

        Args:
          y: targets by part.
          logits: by part.
          products: of n directions with all `columns`, `[K, N, n]`.
          weights: by part.
          draws: number of drawn columns.
        """
        start = draws if any(part.curvature == "sampled" for part in self.parts) else 0
        total = tf.reduce_sum(tf.zeros_like(products), axis=0)  # there may be no columns at all
        for part, target, z, weight in zip(self.parts, y, logits, weights, strict=True):
            if part.curvature in ("sampled", "none"):
                continue
            exact = part.at_logits.exact_columns(z.shape) if part.curvature == "exact" else None
            mine, start = products[start : start + (exact or 1)], start + (exact or 1)
            beyond = part.at_logits.beyond(target, z, mine, weight) if exact else None
            if beyond is not None:
                total += beyond
        return total

    def quadratic(
        self, y: Sequence, logits: Sequence, directions: Sequence, weights: Sequence
    ) -> tf.Tensor:
        """Sum over a batch of v' H v for a direction v of the logits of each part."""

        def of_part(part, y, z, v, weight):
            if part.curvature == "none":
                return tf.zeros(())
            if part.reweighted:
                along = part.empirical_column(y, z, weight) * tf.cast(v, tf.float32)
                return tf.reduce_sum(tf.reduce_sum(along, axis=range(1, len(v.shape))) ** 2)
            return tf.reduce_sum(part.at_logits.quadratic(y, z, v, weight))

        return _sum(self._by_part(of_part, y, logits, directions, weights))

    def _by_part(self, function: Callable, *by_part: Sequence) -> list:
        results = []
        for part, *args in zip(self.parts, *by_part, strict=True):
            with _naming(self.keys, part.output):
                results.append(function(part, *args))
        return results


def _weighted_gradient(part: OutputLoss, y, z, weight) -> tf.Tensor:
    return weigh_values(part.at_logits.gradient(y, z), weight)


def make_total_loss(
    graph: Graph, loss: Any, loss_weights: Any = None, curvature: str = "auto"
) -> TotalLoss:
    """The loss of a model at its logits.

    Args:
      graph: the traced model.
      loss: what `model.compile` was given: one loss for all outputs, or a list or dict of one per
        output, None where an output has none.
      loss_weights: what `model.compile` was given besides.
      curvature: see `LossHead.factors`; `"auto"` is exact up to `AUTO_EXACT_COLUMNS` columns of all
        parts together, else sampled, and empirical for parts whose Hessian is zero almost
        everywhere.

    Raises:
      ValueError: if there is no loss, there are losses or weights too many or too few, or
        `curvature` is unknown.
      TypeError: for a loss that cannot be called.
    """
    keys = graph.output_keys
    losses = losses_by_output(loss, keys, graph.names_outputs)
    weights = weights_by_output(loss_weights, loss, keys)
    given = [number for number, one in enumerate(losses) if one is not None]
    if not given:
        raise ValueError("Found no loss. Compile the model with one, or pass `loss=`.")
    heads = [find_head(graph, number) for number in given]
    at_logits = []
    for number, head in zip(given, heads, strict=True):
        with _naming(keys, number):
            at_logits.append(make_loss_head(losses[number], head.activation))
    shapes = [graph.tensors[graph.outputs[number]].shape for number in given]
    parts = [
        OutputLoss(
            key=keys[number],
            output=number,
            head=head,
            at_logits=at_head,
            at_output=make_loss_head(losses[number]),
            weight=weights[number],
            curvature=resolved,
            labels=at_head.labels(shape),
        )
        for number, head, at_head, shape, resolved in zip(
            given, heads, at_logits, shapes, _resolve(curvature, at_logits, shapes), strict=True
        )
    ]
    return TotalLoss(tuple(parts), keys)


def _resolve(name: str, losses: Sequence[LossHead], shapes: Sequence) -> list[Curvature]:
    resolved = [resolve_curvature(name, *one) for one in zip(losses, shapes, strict=True)]
    if name != "auto":
        return resolved
    columns = [
        loss.exact_columns(shape) or 0
        for loss, shape, one in zip(losses, shapes, resolved, strict=True)
        if one != "empirical"
    ]
    if "sampled" not in resolved and sum(columns) <= AUTO_EXACT_COLUMNS:
        return resolved
    return ["sampled" if one == "exact" else one for one in resolved]


def _seed_of(seed: Any, number: int) -> Any:
    """A seed of its own for each part, as draws of different parts must be independent."""
    if seed is None or number == 0:
        return seed
    return tf.random.experimental.stateless_fold_in(seed, number)


def _times(factor: float, weight: tf.Tensor) -> tf.Tensor:
    return weight if factor == 1.0 else factor * weight


def _sum(values: Sequence) -> tf.Tensor:
    return values[0] if len(values) == 1 else tf.add_n(values)


@contextlib.contextmanager
def _naming(keys: Sequence[str], number: int):
    """Errors of one output of several say which."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if len(keys) == 1:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"Output '{keys[number]}': {error}") from error
