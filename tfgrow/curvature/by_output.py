"""Which loss, with which weight, and which target belongs to which output of a model, as in `fit`.

Everything is matched by position (lists, in the order of the flat outputs) or by name (dicts). The
names, or *keys*, of a model's outputs are the keys of the dict it gives, else its `output_names`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf


def losses_by_output(loss: Any, keys: Sequence[str], names_outputs: bool) -> list:
    """What `compile` was given as `loss`: the loss of each output, None where it has none.

    Args:
      loss: one for all outputs, a list of one per output, or a dict.
      keys: the names of the outputs.
      names_outputs: whether the model gives its outputs as a dict: then a dict of losses may leave
        some out.

    Raises:
      ValueError: if there are losses too many or too few.

    Example:

    >>> losses_by_output({"b": "mse", "a": None}, ("a", "b"), names_outputs=False)
    [None, 'mse']
    """
    if isinstance(loss, Mapping):
        if len(keys) == len(loss) == 1:
            return list(loss.values())
        missing = [] if names_outputs else [key for key in keys if key not in loss]
        _check_names("losses", loss, missing, keys)
        return [loss.get(key) for key in keys]
    if not isinstance(loss, (list, tuple)):
        return [loss] * len(keys)
    if len(loss) != len(keys):
        raise ValueError(
            f"Found {len(loss)} losses ({loss!r}) for {_outputs(keys)}; give one per output, None "
            "where an output has no loss."
        )
    return list(loss)


def weights_by_output(loss_weights: Any, loss: Any, keys: Sequence[str]) -> list[float]:
    """What `compile` was given as `loss_weights`: the weight of each output's loss, 1 by default.

    Args:
      loss_weights: None, a number where there is one loss, or a list or dict like that of losses.
      loss: what `compile` was given as `loss`.
      keys: the names of the outputs.

    Raises:
      ValueError: if there are weights too many or too few, or one that is negative.

    Example:

    >>> weights_by_output([0.5, None], ["mse", "mae"], ("a", "b"))
    [0.5, 1.0]
    """
    weights = [1.0] * len(keys)
    if loss_weights is None:
        return weights
    named = isinstance(loss, Mapping) and len(keys) > 1
    where = [output for output, key in enumerate(keys) if not named or key in loss]
    if named and isinstance(loss_weights, Mapping):
        owners = [keys[output] for output in where]
        missing = [key for key in owners if key not in loss_weights]
        _check_names("loss_weights", loss_weights, missing, owners)
        given = [loss_weights[key] for key in owners]
    else:  # Keras pairs losses and weights in the order of its flat structures, a dict's by key
        given = keras.tree.flatten(loss_weights)
    shared = not isinstance(loss, (Mapping, list, tuple))
    if len(given) != (1 if shared else len(where)):
        raise ValueError(
            f"Found loss_weights={loss_weights!r} for loss={loss!r}; give one number per loss, in "
            "the same structure (a list of losses for a list of weights)."
        )
    for output, weight in zip(where, given * len(where) if shared else given, strict=True):
        weights[output] = _checked(weight, keys[output])
    return weights


def values_by_output(what: str, given: Any, keys: Sequence[str], wanted: Sequence[int]) -> list:
    """A batch's targets or weights of some outputs, None where there are none.

    Args:
      what: `"targets"` or `"sample weights"`, for errors.
      given: a tensor, a list or tuple of one per output (or per wanted one), or a dict.
      keys: the names of the outputs.
      wanted: the positions of those that have a loss.

    Raises:
      ValueError: if there are values too many or too few.

    Example:

    >>> values_by_output("targets", {"b": 2}, ("a", "b"), [1])
    [2]
    """
    if isinstance(given, Mapping) and len(keys) > 1:
        _check_names(what, given, [], keys)
        return [given.get(keys[output]) for output in wanted]
    values = tf.nest.flatten(given)
    if len(values) == len(keys):
        return [values[output] for output in wanted]
    if len(values) == len(wanted):
        return values
    losses = "" if len(wanted) == len(keys) else f", {len(wanted)} of which have a loss"
    raise ValueError(
        f"The dataset gives {len(values)} {what} for {_outputs(keys)}{losses}; give one per "
        "output, as a list in this order or as a dict."
    )


def _check_names(what: str, given: Mapping, missing: Sequence[str], keys: Sequence[str]) -> None:
    extra = [key for key in given if key not in keys]
    faults = [f"none for {list(missing)}"] * bool(missing) + [f"{extra} too"] * bool(extra)
    if faults:
        raise ValueError(
            f"Found {what} for {[key for key in given if key in keys]}, {' and '.join(faults)}; "
            f"expected {_outputs(keys)}."
        )


def _outputs(keys: Sequence[str]) -> str:
    return f"the output {list(keys)}" if len(keys) == 1 else f"the outputs {list(keys)}"


def _checked(weight: Any, key: str) -> float:
    number = 1.0 if weight is None else float(weight)
    if not 0 <= number < math.inf:
        raise ValueError(
            f"The loss weight of output '{key}' is {number:g}; expected a finite number >= 0: the "
            "estimate takes its square root."
        )
    return number
