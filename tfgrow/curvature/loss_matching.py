"""From a Keras loss and the model's last activation to the loss as a function of the logits.

Keras' crossentropies look behind the activation: whenever their input is the output of
`keras.activations.softmax` or `sigmoid`, they are computed at its logits, whatever `from_logits`
says and whichever of the two it is. So these pairs are closed forms here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfgrow.curvature.autodiff_loss import AutodiffLoss
from tfgrow.curvature.row_losses import (
    RowLoss,
    SigmoidCrossentropy,
    SoftmaxCrossentropy,
    SquaredError,
)
from tfgrow.curvature.targets import align_ranks

_losses, _acts = keras.losses, keras.activations

_SPARSE = (_losses.SparseCategoricalCrossentropy, _losses.sparse_categorical_crossentropy)
_CATEGORICAL = (_losses.CategoricalCrossentropy, _losses.categorical_crossentropy)
_BINARY = (_losses.BinaryCrossentropy, _losses.binary_crossentropy)
_SQUARED = (_losses.MeanSquaredError, _losses.mean_squared_error)

_FLAT = (
    *(_losses.MeanAbsoluteError, _losses.mean_absolute_error),
    *(_losses.MeanAbsolutePercentageError, _losses.mean_absolute_percentage_error),
    *(_losses.Hinge, _losses.hinge, _losses.CategoricalHinge, _losses.categorical_hinge),
)
"""Losses that are piecewise linear in the prediction."""

_ON_LAST_AXIS = (
    *(*_SPARSE, *_CATEGORICAL, *_BINARY, *_SQUARED, *_FLAT),
    *(_losses.MeanSquaredLogarithmicError, _losses.mean_squared_logarithmic_error),
    _losses.cosine_similarity,  # the class may have another axis and does not say so
    *(_losses.Huber, _losses.huber, _losses.LogCosh, _losses.log_cosh),
    *(_losses.SquaredHinge, _losses.squared_hinge, _losses.Poisson, _losses.poisson),
    *(_losses.KLDivergence, _losses.kl_divergence),
    *(_losses.BinaryFocalCrossentropy, _losses.binary_focal_crossentropy),
    *(_losses.CategoricalFocalCrossentropy, _losses.categorical_focal_crossentropy),
    _losses.CategoricalGeneralizedCrossEntropy,
)
"""Losses that treat every position alone (unless configured with another `axis`)."""

_READ_LOGITS = (_acts.softmax, _acts.sigmoid, keras.ops.softmax, keras.ops.sigmoid)
"""Activations behind which the crossentropies look."""

_PIECEWISE_LINEAR = (_acts.linear, _acts.relu, _acts.relu6, _acts.leaky_relu, _acts.hard_tanh)

_KERAS_ACTIVATIONS = tuple(
    getattr(_acts, name) for name in dir(_acts) if name not in ("get", "serialize", "deserialize")
)


@dataclasses.dataclass(frozen=True, eq=False)
class MatchedLoss:
    """A loss as a function of the logits.

    Attributes:
      row_loss: the loss of one row of logits.
      ignore_class: label whose positions do not count, or None.
      name: of the Keras loss, for errors.
    """

    row_loss: RowLoss
    ignore_class: int | None
    name: str


def match_loss(loss: Any, last_activation: Any = None) -> MatchedLoss:
    """The loss `y, z -> loss(y, last_activation(z))` of the logits z, in closed form if known.

    Args:
      loss: a `keras.losses.Loss`, the name of one, or a function `(y, y_pred)` returning losses
        that are not averaged over the batch.
      last_activation: a function, the name of a Keras activation, a Keras activation layer, or
        None for none.

    Raises:
      ValueError: if there is no loss, more than one, or one that is no mean over samples.
      TypeError: if the loss or the activation is not callable.
    """
    loss, activation = resolve_loss(loss), resolve_activation(last_activation)
    kind = loss if not isinstance(loss, keras.losses.Loss) else type(loss)
    config = loss.get_config() if kind is not loss else {}
    name = getattr(loss, "name", getattr(loss, "__name__", type(loss).__name__))
    ignore_class = config.get("ignore_class") if kind in _SPARSE else None
    row_loss = _closed_form(kind, config, activation) or _by_autodiff(
        kind, config, loss, activation, name
    )
    return MatchedLoss(row_loss, ignore_class, name)


def resolve_loss(loss: Any) -> Any:
    """The one `keras.losses.Loss` or function that `loss` stands for; raises as `match_loss`."""
    if isinstance(loss, dict):
        loss = list(loss.values())
    if isinstance(loss, (list, tuple)):
        if len(loss) != 1:
            raise ValueError(
                f"Found {len(loss)} losses ({loss!r}), expected one: growth needs a model with a "
                "single output and a single loss. Pass `loss=` the one to reduce."
            )
        loss = loss[0]
    if loss is None:
        raise ValueError("Found no loss. Compile the model with one, or pass `loss=`.")
    if str(loss).lower() in ("crossentropy", "ce"):
        raise ValueError(
            f"The loss {loss!r} is ambiguous without data. Name the one you mean: "
            "'sparse_categorical_crossentropy', 'categorical_crossentropy' or "
            "'binary_crossentropy'."
        )
    resolved = keras.losses.get(loss) if isinstance(loss, (str, type)) else loss
    if not callable(resolved):
        raise TypeError(
            f"Found a loss of type {type(loss).__name__} ({loss!r}), expected a keras.losses.Loss, "
            "its name, or a function (y, y_pred) -> loss per sample."
        )
    if isinstance(resolved, keras.losses.Circle):
        raise ValueError(
            "The loss Circle compares the samples of a batch with each other, so it has no "
            "curvature per sample. Pass `loss=` a loss that is a mean over samples."
        )
    return resolved


def resolve_activation(activation: Any) -> Callable[[tf.Tensor], tf.Tensor]:
    """The function that a name or layer stands for; `keras.activations.linear` for None."""
    if isinstance(activation, keras.layers.Activation):
        activation = activation.activation
    if isinstance(activation, keras.layers.Softmax) and activation.axis == -1:
        activation = keras.activations.softmax
    resolved = keras.activations.get(activation)
    if not callable(resolved):
        raise TypeError(
            f"Found a last activation of type {type(activation).__name__} ({activation!r}), "
            "expected a function, the name of a Keras activation, or None."
        )
    return resolved


def hides_logits(activation: Any) -> bool:
    """Whether Keras' crossentropies look behind a last activation."""
    return activation is not None and resolve_activation(activation) in _READ_LOGITS


def _closed_form(kind: Any, config: dict[str, Any], activation: Any) -> RowLoss | None:
    linear = activation is keras.activations.linear
    if kind in _SQUARED and linear:
        return SquaredError()
    at_logits = hides_logits(activation) or (linear and config.get("from_logits", False))
    smoothing = config.get("label_smoothing", 0.0)
    if kind in _BINARY and at_logits:
        return SigmoidCrossentropy(smoothing)
    if kind in _CATEGORICAL and at_logits and config.get("axis", -1) == -1:
        return SoftmaxCrossentropy(sparse=False, label_smoothing=smoothing)
    if kind in _SPARSE and (
        at_logits if config.get("ignore_class") is None else _same_probabilities(config, activation)
    ):
        return SoftmaxCrossentropy(sparse=True)
    return None


def _same_probabilities(config: dict[str, Any], activation: Any) -> bool:
    """Whether softmax(z) are the probabilities of a loss with `ignore_class`.

    Masking the predictions hides the activation from Keras, so here `from_logits` counts.
    """
    from_logits = config.get("from_logits", False)
    return activation is (keras.activations.linear if from_logits else keras.activations.softmax)


def _by_autodiff(
    kind: Any, config: dict[str, Any], loss: Any, activation: Any, name: str
) -> AutodiffLoss:
    unreduced = loss.call if isinstance(loss, keras.losses.Loss) else _with_aligned_ranks(loss)

    def losses(y: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
        return unreduced(tf.cast(y, tf.float32), activation(z))

    on_last_axis = kind in _ON_LAST_AXIS and config.get("axis", -1) == -1
    return AutodiffLoss(
        losses,
        per_position=on_last_axis and activation in _KERAS_ACTIVATIONS,
        piecewise_linear=kind in _FLAT and activation in _PIECEWISE_LINEAR,
        name=name,
    )


def _with_aligned_ranks(function: Callable) -> Callable:
    return lambda y, prediction: function(*align_ranks(y, prediction))
