"""What checks on single samples say of estimates: a correction, as far as it can be trusted.

Candidate c was checked on `n_c` samples, on which the loss changed by `m_c` more than estimated, on
average. Its true `m_c` is taken as normal around 0 with the variance `tau s_c^2`, and what one
sample shows as normal around that with `kappa s_c^2`, where `s_c` is the root mean square of its
estimates by sample. The mean of the posterior is `m_c tau / (tau + kappa / n_c)`. Both numbers are
those that the candidates of a group show (moment estimates; empirical Bayes, Efron & Morris 1973).
"""

from __future__ import annotations

import numpy as np


def corrections(
    groups: np.ndarray, squares: np.ndarray, drawn: np.ndarray, rest: np.ndarray, rest2: np.ndarray
) -> np.ndarray:
    """What to add to the estimates, `[C]`.

    Args:
      groups: candidates with equal entries are taken to err alike, `[C]`.
      squares: mean square of each one's estimates by sample.
      drawn: number of samples each was checked on.
      rest: sum of what the loss really changed by beyond the estimate, on those.
      rest2: sum of its square.

    Example: two checks hardly tell two candidates apart from noise, two hundred do.

    >>> ones = np.ones(2)
    >>> few = corrections(np.zeros(2), ones, 2 * ones, np.array([1.0, 0.6]), np.array([2.0, 2.0]))
    >>> many = corrections(
    ...     np.zeros(2), ones, 200 * ones, np.array([100.0, 60.0]), np.array([200.0, 200.0]))
    >>> few.round(2), many.round(2)
    (array([0., 0.]), array([0.49, 0.29]))
    """
    mean = _ratio(rest, drawn)
    factor = np.zeros(len(mean))
    for group in np.unique(groups):
        mine = np.flatnonzero((groups == group) & (drawn > 0) & (squares > 0))
        n, square = drawn[mine], squares[mine]
        freedom = (square * (n - 1.0)).sum()
        if freedom > 0:  # else no candidate was checked twice: what is noise can't be told
            kappa = max(0.0, (rest2[mine] - n * mean[mine] ** 2).sum()) / freedom
            tau = max(0.0, float(np.mean(mean[mine] ** 2 / square - kappa / n)))
            factor[mine] = _ratio(np.full(len(mine), tau), tau + kappa / n)
    return factor * mean


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the divisor is."""
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=below != 0)
