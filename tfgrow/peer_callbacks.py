"""What growth does to the callbacks beside it: weights they keep must fit the grown model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import keras
import numpy as np

from tfgrow.surgery.weights import inherited
from tfgrow.types import LayerChange


def carry_over(
    peers: Iterable[keras.callbacks.Callback], model: keras.Model, changes: Sequence[LayerChange]
) -> None:
    """Widens the best weights that `EarlyStopping` keeps, so that they compute what they did.

    Any other callback that keeps weights can follow too: if it has a method
    `on_model_grown(changes)`, that is called with the layer changes.
    """
    if not changes:
        return
    for peer in peers:
        if isinstance(peer, keras.callbacks.EarlyStopping) and peer.best_weights is not None:
            peer.best_weights = widen_weights(model, peer.best_weights, changes)
        follow = getattr(peer, "on_model_grown", None)
        if follow is not None:
            follow(changes)


def widen_weights(
    model: keras.Model, weights: Sequence[np.ndarray], changes: Sequence[LayerChange]
) -> list[np.ndarray]:
    """Weights as from `model.get_weights()` before it grew, widened to its present shape.

    The function they computed is unchanged: layers that are new change nothing in it.
    """
    by_variable = {
        id(variable): variable_change
        for change in changes
        for variable, variable_change in change.edited()
    }
    newborn = {
        id(variable): value
        for change in changes
        if change.inserted is not None
        for variable, value in zip(change.layer.weights, change.inserted, strict=True)
    }
    before = iter(weights)
    return [
        newborn[id(variable)]
        if id(variable) in newborn
        else _followed(by_variable.get(id(variable)), next(before))
        for variable in model.weights
    ]


def _followed(change, old: np.ndarray) -> np.ndarray:
    return old if change is None else inherited(change, old)
