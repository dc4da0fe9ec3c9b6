"""Uniform: all widths grow by the same factor. What one does without any method."""

from __future__ import annotations

from tfgrow.morphisms.base import Candidate
from tfgrow.strategies.base import Room, Strategy, scaled_alike


class Uniform(Strategy):
    """Scales all widths alike; new units have random incoming and zero outgoing weights.

    The function is unchanged. The factor is the largest that fits the step and the budget. The
    "width multiplier" of MobileNets (Howard et al. 2017, arXiv 1704.04861), applied in steps.

    Args:
      **kwargs: see `tfgrow.strategies.Strategy`.

    Example:

    >>> import keras, numpy as np, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu", name="a"), keras.layers.Dense(2)]))
    >>> data = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    >>> tfgrow.strategies.Uniform(max_params=60, growth_per_step=None).propose_plan(
    ...     model, data).widths
    {'a': (3, 8)}
    """

    endless = True

    def choose(self, room: Room) -> list[Candidate]:
        return room.new_units(scaled_alike(room))
