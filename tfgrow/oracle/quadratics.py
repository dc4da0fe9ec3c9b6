"""The joint quadratic while a set is picked from it: what each candidate would still change.

Two views of the same quadratic `linear.a + 1/2 a'gram a` in the lengths `a` of the candidates:

* `FixedLengths`: a candidate is taken at length 1, or not at all;
* `FreeLengths`: each pick lets the lengths of all picks so far be the best ones (orthogonal
  matching pursuit; Pati, Rezaiifar and Krishnaprasad 1993, in the Gauss-Newton metric). Candidates
  that say what others say already promise nothing then, instead of to overshoot.

Layouts: `slope [n]` is the first-order change of each candidate given the picks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfgrow.types import Interaction, damping_of


class FixedLengths:
    """Picks are taken as they are."""

    def __init__(self, linear: np.ndarray, gram: np.ndarray) -> None:
        self.slope = np.array(linear, dtype=np.float64)
        self.gram = 0.5 * (gram + np.transpose(gram))  # what a quadratic form sees of a matrix

    def changes(self, rows=slice(None)) -> np.ndarray:
        """What each of some candidates would change the loss by."""
        return self.slope[rows] + 0.5 * np.diag(self.gram)[rows]

    def take(self, i: int) -> None:
        """Picks a candidate."""
        self.slope += self.gram[:, i]

    def of(self, rows: np.ndarray) -> FixedLengths:
        """A copy for some of the candidates only."""
        return type(self)(self.slope[rows], self.gram[np.ix_(rows, rows)])

    def lengths(self, picked: Sequence[int], interaction: Interaction) -> np.ndarray:
        """At which lengths the picks are to be applied."""
        del interaction
        return np.ones(len(picked))


class FreeLengths:
    """Picks get the lengths that are best for all of them.

    Of the quadratic that is left after the picks only the diagonal is kept up to date, beside the
    columns of a Cholesky factor of what they took away: a pick costs as much as there are
    candidates times picks.

    Args:
      linear, gram: the quadratic.
      least: the least length of each candidate, `[n]`; one that is negative can be turned round.
      ridge: added to each candidate's own curvature, `[n]`; by default a share of it.
    """

    def __init__(
        self,
        linear: np.ndarray,
        gram: np.ndarray,
        least: np.ndarray,
        ridge: np.ndarray | None = None,
    ) -> None:
        self.slope = np.array(linear, dtype=np.float64)
        self._gram = 0.5 * (gram + np.transpose(gram))  # as it was before the picks
        self._diagonal = np.diag(self._gram).copy()
        self._factor: list[np.ndarray] = []
        self._least = np.asarray(least, dtype=np.float64)
        self._ridge = damping_of(self._gram) if ridge is None else ridge

    @property
    def gram(self) -> np.ndarray:
        """The quadratic that is left, `[n, n]`."""
        return self._left(np.arange(len(self.slope)))

    def changes(self, rows=slice(None)) -> np.ndarray:
        """What each of some candidates would change the loss by."""
        slope = self.slope[rows]
        downhill = np.where(self._least[rows] < 0.0, slope, np.minimum(slope, 0.0))
        return -0.5 * downhill**2 / (self._diagonal[rows] + self._ridge[rows])

    def take(self, i: int) -> None:
        """Picks a candidate."""
        column = self._gram[:, i].copy()
        for taken in self._factor:
            column -= taken * taken[i]
        pivot = column[i] + self._ridge[i]
        self.slope -= column * (self.slope[i] / pivot)
        self._factor.append(column / np.sqrt(pivot))
        self._diagonal -= self._factor[-1] ** 2

    def of(self, rows: np.ndarray) -> FreeLengths:
        """A copy for some of the candidates only."""
        left = self._left(np.asarray(rows, dtype=int))
        return type(self)(self.slope[rows], left, self._least[rows], self._ridge[rows])

    def _left(self, rows: np.ndarray) -> np.ndarray:
        left = self._gram[np.ix_(rows, rows)].copy()
        for taken in self._factor:
            left -= np.outer(taken[rows], taken[rows])
        return left

    def lengths(self, picked: Sequence[int], interaction: Interaction) -> np.ndarray:
        """At which lengths the picks are to be applied."""
        rows = np.asarray(picked, dtype=int)
        return interaction.of(rows).best_lengths(least=self._least[rows], most=1.0)
