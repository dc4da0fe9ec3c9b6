"""Net2Net: units drawn at random are copied, and both copies keep half of the outgoing weights."""

from __future__ import annotations

import numpy as np

from tfgrow.morphisms.base import Candidate
from tfgrow.morphisms.registry import candidates as make_candidates
from tfgrow.morphisms.split import START
from tfgrow.strategies.base import Room, Strategy, scaled_alike

TWICE = 2.0
"""Every unit is copied once at most in one step."""


class Net2Net(Strategy):
    """Net2WiderNet: widths grow by one factor, new units being copies of units drawn at random.

    Source: Chen, Goodfellow, Shlens 2016, "Net2Net", arXiv 1511.05641, section 2.3. The paper draws
    with replacement, divides outgoing weights by the number of copies, and, where no dropout tells
    them apart, adds noise to all of them but the first; here each unit is copied once at most per
    step, and the noise goes to both copies with opposite signs, so that to first order nothing
    changes. Which layers grow, and how much, the paper leaves to the user: all by one factor.

    Args:
      noise: standard deviation of the noise, relative to the unit's weights.
      **kwargs: see `tfgrow.strategies.Strategy`.

    Example:

    >>> import keras, numpy as np, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu", name="a"), keras.layers.Dense(2)]))
    >>> data = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    >>> plan = tfgrow.strategies.Net2Net(growth_per_step=2).propose_plan(model, data)
    >>> [(c.morphism, c.site.name) for c in plan.candidates]
    [('split', 'a'), ('split', 'a')]
    """

    def __init__(self, objective="val_loss", *, noise: float = 0.01, **kwargs) -> None:
        super().__init__(objective, **kwargs)
        if not (isinstance(noise, (int, float)) and 0 <= noise < np.inf):
            raise ValueError(f"noise must be a finite number >= 0. Found: {noise!r}")
        self.noise = noise

    def choose(self, room: Room) -> list[Candidate]:
        rng = np.random.default_rng(room.seed)
        chosen = []
        for name, count in scaled_alike(room, most=TWICE).items():
            if count:
                every = make_candidates(room.model, "split", sites=[name], seed=room.seed)
                drawn = rng.choice(len(every), size=min(count, len(every)), replace=False)
                chosen += [self._copy(every[index]) for index in sorted(drawn)]
        return chosen

    def _copy(self, candidate: Candidate) -> Candidate:
        """The candidate with the paper's noise for theta."""
        theta = {k: self.noise / START * value for k, value in candidate.theta.items()}
        return candidate.replace(theta=theta)
