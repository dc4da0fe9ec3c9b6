"""Random: new units at random places. The yardstick of every choice of places."""

from __future__ import annotations

import numpy as np

from tfgrow.morphisms.base import Candidate
from tfgrow.strategies.base import Room, Strategy


class RandomUnits(Strategy):
    """Adds units to sites drawn at random, one after the other, until no more fit.

    They have random incoming and zero outgoing weights; the function is unchanged.

    Args:
      **kwargs: see `tfgrow.strategies.Strategy`.

    Example:

    >>> import keras, numpy as np, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu", name="a"), keras.layers.Dense(2)]))
    >>> data = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    >>> tfgrow.strategies.RandomUnits(growth_per_step=2, seed=0).propose_plan(model, data).widths
    {'a': (3, 5)}
    """

    endless = True

    def choose(self, room: Room) -> list[Candidate]:
        rng = np.random.default_rng(room.seed)
        extra: dict[str, int] = {}
        open_to = list(room.sites)
        while open_to:
            name = open_to[rng.integers(len(open_to))]
            wanted = room.next_width(name, extra.get(name, 0)) - room.sites[name].units
            if room.fits({**extra, name: wanted}):
                extra[name] = wanted
            else:
                open_to.remove(name)
        return room.new_units(extra)
