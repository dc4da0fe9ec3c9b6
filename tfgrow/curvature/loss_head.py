"""The loss end of the Gauss-Newton estimate: from logits to loss, gradient and Hessian columns.

The *logits* z `[N, ..., D]` are what the model computes before its last activation; a last softmax
or sigmoid belongs to the loss. Between the first and the last axis may lie *positions* (time steps,
pixels). Sample i has the loss l_i, the mean over its positions, as Keras' `sum_over_batch_size`
takes it; H_i is the Hessian of l_i with respect to z_i. *Columns* h_k are K tensors of the shape of
z, float32, with sum_k h_ik h_ik^T = H_i (Gauss-Newton: Lawton et al., arXiv 2411.05855).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import tensorflow as tf

from tfgrow.curvature.columns import columns_of_positions, weigh_values
from tfgrow.curvature.loss_matching import match_loss
from tfgrow.curvature.row_losses import RowLoss, SoftmaxCrossentropy
from tfgrow.curvature.targets import sparse_targets

Curvature = Literal["exact", "sampled", "empirical", "none"]

AUTO_EXACT_COLUMNS = 16
"""Up to this many columns `"auto"` is exact; a pass per column costs more than it tells beyond."""


@dataclasses.dataclass(frozen=True, eq=False)
class LossHead:
    """Loss, gradient and curvature per sample, as functions of the logits.

    Pure functions on tensors, for eager use and inside `tf.function`. Everything is computed in
    float32, whatever the dtype of `z` and of the loss. Masks that Keras attaches to outputs are
    not seen here, but made sample weights of by `Arranging`. Sample weights are multiplied outside,
    see `columns`.

    Attributes:
      row_loss: the loss of one row of logits.
      ignore_class: label whose positions do not count, or None. As in Keras the mean is then over
        the counted positions of the whole batch.
      name: of the Keras loss, for errors.
    """

    row_loss: RowLoss
    ignore_class: int | None
    name: str

    def per_sample(self, y: tf.Tensor, z: tf.Tensor, weights: Any = None) -> tf.Tensor:
        """Loss `[N]` of each sample, mean over its positions; its batch mean is Keras' loss.

        Args:
          y: targets, as the loss takes them.
          z: logits `[N, ..., D]`.
          weights: of samples `[N]`, or of positions too `[N, ...]`.
        """
        z = _float(z)
        rows, targets, scale = self._rows(y, z)
        return self._sum_positions(scale * self.row_loss.values(targets, rows), z, weights)

    def gradient(self, y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
        """Gradient of each sample's loss with respect to its logits, of the shape of `z`."""
        z = _float(z)
        with tf.GradientTape() as tape:
            tape.watch(z)
            total = tf.reduce_sum(self.per_sample(y, z))
        return tape.gradient(total, z, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    def factors(
        self,
        y: tf.Tensor,
        z: tf.Tensor,
        curvature: str = "auto",
        draws: int = 1,
        seed: Any = None,
    ) -> list[tf.Tensor]:
        """Columns of the Hessian of each sample's loss: K tensors of the shape of `z`.

        Args:
          y: targets, as the loss takes them.
          z: logits `[N, ..., D]`.
          curvature: `"exact"` columns make up the Hessian's positive part; `"sampled"` ones do so
            in expectation over the seed; `"empirical"` is the gradient alone. (Its square has the
            scale of the Hessian only for crossentropies of a single position: the mean over
            positions, or over the outputs of a squared error, shrinks it.) `"none"` are no columns.
            `"auto"` chooses, see `resolve_curvature`.
          draws: number of sampled columns, at least 1.
          seed: two int32, a stateless seed; needed by `"sampled"`.

        Raises:
          ValueError: for an unknown curvature, no draws, no seed, or exact columns of a
            shape that is not fixed.
        """
        z = _float(z)
        curvature = resolve_curvature(curvature, self, z.shape)
        if curvature == "none":
            return []
        if curvature == "empirical":
            return [self.gradient(y, z)]
        rows, targets, scale = self._rows(y, z)
        if curvature == "sampled":
            root = self.row_loss.sampled_root(targets, rows, _checked(draws), _seed(seed))
        else:
            root = self.row_loss.exact_root(targets, rows)
        root *= tf.sqrt(scale)[:, None, None]
        if curvature == "sampled" or self._positions(z.shape) == 1:
            return [tf.reshape(h, tf.shape(z)) for h in tf.unstack(root, axis=-1)]
        return columns_of_positions(root, z)

    def quadratic(self, y: tf.Tensor, z: tf.Tensor, v: tf.Tensor, weights: Any = None) -> tf.Tensor:
        """v_i^T H_i v_i `[N]` for a direction `v` of the shape of `z` (H_i: its positive part)."""
        z = _float(z)
        rows, targets, scale = self._rows(y, z)
        along = tf.reshape(_float(v), tf.shape(rows))
        values = scale * self.row_loss.quadratic(targets, rows, along)
        return self._sum_positions(values, z, weights)

    def beyond(
        self, y: tf.Tensor, z: tf.Tensor, products: tf.Tensor, weights: tf.Tensor
    ) -> tf.Tensor | None:
        """What each sample's weighted loss changes by along directions, beyond the second order.

        Args:
          y: targets.
          z: logits `[N, ..., D]`.
          products: of n directions with the exact columns of the weighted loss, `[K, N, n]`.
          weights: of samples `[N]`, or of positions too.

        Returns:
          `[N, n]`; None where the columns don't tell it, or the loss is quadratic.
        """
        z = _float(z)
        rows, targets, scale = self._rows(y, z)
        if not self.row_loss.per_position:
            return None
        scale = tf.reshape(weigh_values(tf.reshape(scale, tf.shape(z)[:-1]), weights), (-1, 1))
        count, size = products.shape[2], z.shape[-1]
        by_position = tf.reshape(products, (-1, size, tf.shape(z)[0], count))
        of_rows = tf.reshape(tf.transpose(by_position, (2, 0, 1, 3)), (-1, size, count))
        of_rows = tf.math.divide_no_nan(of_rows, tf.sqrt(scale)[:, :, None])
        beyond = self.row_loss.beyond(targets, rows, of_rows)
        if beyond is None:
            return None
        by_sample = tf.reshape(scale * beyond, (tf.shape(z)[0], -1, count))
        return tf.reduce_sum(by_sample, axis=1)

    def labels(self, z_shape: Sequence[int | None]) -> range | None:
        """The class indices that targets may hold; None if they are no class indices."""
        sparse = isinstance(self.row_loss, SoftmaxCrossentropy) and self.row_loss.sparse
        known = sparse and self.ignore_class is None and z_shape[-1] is not None
        return range(int(z_shape[-1])) if known else None  # type: ignore[arg-type]

    def exact_columns(self, z_shape: Sequence[int | None]) -> int | None:
        """Number of exact columns for logits of shape `[N, ..., D]`; None if not fixed."""
        return _product(tuple(z_shape)[1:])

    def _positions(self, z_shape: Sequence[int | None]) -> int | None:
        """Rows per sample: 1 if a sample is one row, None if not fixed."""
        return _product(tuple(z_shape)[1:-1]) if self.row_loss.per_position else 1

    def _rows(self, y: tf.Tensor, z: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Logits, targets and scale `[M]` of the rows; a sample's loss is its scaled sum."""
        y = tf.convert_to_tensor(y)
        if z.shape.rank is None or z.shape.rank < 2 or z.shape[-1] is None:
            raise ValueError(
                f"The model's output has shape {z.shape}; expected [samples, ..., outputs] with a "
                "fixed number of outputs. Give the output layer a fixed last axis."
            )
        rows = tf.reshape(z, [-1, z.shape[-1]]) if self.row_loss.per_position else z
        count, samples = tf.shape(rows)[0], tf.shape(z)[0]
        scale = tf.fill([count], tf.math.divide_no_nan(_float(samples), _float(count)))
        if self.ignore_class is None:
            return rows, self.row_loss.targets(y, z), scale
        counted = sparse_targets(y, z) != self.ignore_class
        share = tf.reduce_mean(_float(counted))
        # An ignored label may be no class at all (-1, 255): any class serves where nothing counts.
        y = tf.where(tf.cast(y, tf.int32) == self.ignore_class, 0, tf.cast(y, tf.int32))
        return (
            rows,
            self.row_loss.targets(y, z),
            tf.math.divide_no_nan(scale * _float(counted), share),
        )

    def _sum_positions(self, values: tf.Tensor, z: tf.Tensor, weights: Any = None) -> tf.Tensor:
        """Values of rows summed to samples `[N]`, weighed where there are weights."""
        if self.row_loss.per_position:
            values = tf.reshape(values, tf.shape(z)[:-1])
        if weights is not None:
            weights = _float(weights)
            if not _weighs(weights, values):
                raise ValueError(
                    f"Sample weights of shape {weights.shape} don't fit a loss with values of "
                    f"shape {values.shape}; expected a weight per sample or per value."
                )
            values = weigh_values(values, weights)
        return tf.reduce_sum(values, axis=range(1, values.shape.rank))


def make_loss_head(loss: Any, last_activation: Any = None) -> LossHead:
    """The loss of a model as a function of the logits its last activation is applied to.

    Crossentropies of a softmax or sigmoid and the squared error are closed forms; every other loss
    and activation is differentiated twice and its Hessian's negative eigenvalues are clipped.

    Args:
      loss: what `model.compile` was given: a `keras.losses.Loss`, a name, or a function
        `(y, y_pred)` returning one loss per sample or output. Its `reduction` is not used.
      last_activation: the activation between z and the model's output: a function, a name, a
        `keras.layers.Activation` or `Softmax`, or None for none.

    Raises:
      ValueError: for no loss, several losses, or one that is no mean over samples.
      TypeError: for a loss or activation that cannot be called.

    Example:

    >>> import numpy as np
    >>> head = make_loss_head("sparse_categorical_crossentropy", "softmax")
    >>> y, z = np.array([0, 1]), np.array([[0.0, 0.0], [0.0, 0.0]], "float32")
    >>> head.per_sample(y, z).numpy().round(4)
    array([0.6931, 0.6931], dtype=float32)
    >>> len(head.factors(y, z, "exact"))
    2
    """
    matched = match_loss(loss, last_activation)
    return LossHead(matched.row_loss, matched.ignore_class, matched.name)


def resolve_curvature(name: str, head: LossHead, z_shape: Sequence[int | None]) -> Curvature:
    """The curvature to use for logits of shape `z_shape` `[N, ..., D]`.

    `"auto"` is exact up to `AUTO_EXACT_COLUMNS` columns, else sampled; for losses whose
    Hessian is zero almost everywhere (absolute error, hinge) it is empirical.

    Raises:
      ValueError: if the name is unknown, or `"exact"` is asked of a shape that is not fixed.

    Example:

    >>> head = make_loss_head("mse")
    >>> resolve_curvature("auto", head, (None, 3)), resolve_curvature("auto", head, (None, 100))
    ('exact', 'sampled')
    """
    columns = head.exact_columns(z_shape)
    if name == "auto":
        if head.row_loss.piecewise_linear:
            return "empirical"
        return "exact" if columns is not None and columns <= AUTO_EXACT_COLUMNS else "sampled"
    if name not in get_args(Curvature):
        names = ", ".join(repr(known) for known in ("auto", *get_args(Curvature)))
        raise ValueError(f"Unknown curvature {name!r}; expected one of {names}.")
    if name == "exact" and columns is None:
        raise ValueError(
            f"curvature='exact' needs logits of a fixed shape, the model's have {tuple(z_shape)}. "
            "Fix the output's shape, or use 'sampled'."
        )
    return name  # type: ignore[return-value]


def _weighs(weights: tf.Tensor, values: tf.Tensor) -> bool:
    """Whether the axes of weights are the first ones of values, or of size 1."""
    pairs = zip(weights.shape, values.shape, strict=False)
    fits = all(None in pair or pair[0] in (1, pair[1]) for pair in pairs)
    return fits and weights.shape.rank <= values.shape.rank


def _product(sizes: Sequence[int | None]) -> int | None:
    """Product of the sizes, None if one of them is not fixed."""
    fixed = [size for size in sizes if size is not None]
    return math.prod(fixed) if len(fixed) == len(sizes) else None


def _checked(draws: int) -> int:
    if draws < 1:
        raise ValueError(f"curvature='sampled' needs draws >= 1, found {draws}.")
    return draws


def _seed(seed: Any) -> tf.Tensor:
    if seed is None:
        raise ValueError(
            "curvature='sampled' needs a seed: two int32, e.g. tf.constant([step, 0]), different "
            "for every batch."
        )
    return tf.cast(seed, tf.int32)


def _float(tensor: Any) -> tf.Tensor:
    return tf.cast(tensor, tf.float32)
