"""How well estimates agree with the truth, and how results spread over seeds."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well `count` estimated values agree with measured ones; see the functions below."""

    count: int
    pearson: float
    spearman: float
    median_relative_error: float

    def __str__(self) -> str:
        return (
            f"n {self.count}, Pearson {self.pearson:.4f}, Spearman {self.spearman:.4f}, "
            f"median relative error {self.median_relative_error:.1%}"
        )


def agreement(estimated: ArrayLike, measured: ArrayLike) -> Agreement:
    """All measures of agreement at once.

    Args:
      estimated: estimated values `[n]`.
      measured: true values `[n]`.

    Example:

    >>> from experiments import measures
    >>> str(measures.agreement([-2.0, -1.0, 1.1], [-2.0, -1.0, 1.0]))
    'n 3, Pearson 0.9999, Spearman 1.0000, median relative error 0.0%'
    """
    return Agreement(
        len(np.ravel(measured)),
        pearson(estimated, measured),
        spearman(estimated, measured),
        median_relative_error(estimated, measured),
    )


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Linear correlation of two samples `[n]`; NaN if one of them is constant."""
    a, b = _paired(x, y)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Correlation of the ranks of two samples `[n]`; ties share their mean rank."""
    a, b = _paired(x, y)
    return pearson(_ranks(a), _ranks(b))


def median_relative_error(estimated: ArrayLike, measured: ArrayLike) -> float:
    """Median over `[n]` values of |estimated - measured| / |measured|.

    A value measured as 0 counts as exact if estimated as 0 too, and as infinitely wrong otherwise.
    """
    guess, truth = _paired(estimated, measured)
    error = np.abs(guess - truth)
    ratio = np.full(len(error), np.inf)
    np.divide(error, np.abs(truth), out=ratio, where=truth != 0)
    ratio[error == 0] = 0.0
    return float(np.median(ratio))


def mean_and_std(values: ArrayLike) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the deviation of one value is NaN."""
    sample = np.asarray(values, np.float64).ravel()
    if not sample.size:
        raise ValueError("mean_and_std needs at least one value, found none.")
    return float(sample.mean()), float(sample.std(ddof=1)) if sample.size > 1 else float("nan")


def _paired(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    if a.shape != b.shape or not a.size:
        raise ValueError(
            f"Expected two samples of one length, at least 1; found {a.size} and {b.size} values."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(
            "Expected finite numbers; found NaN or infinite ones at positions "
            f"{np.flatnonzero(~(np.isfinite(a) & np.isfinite(b)))[:5].tolist()}. Filter them out."
        )
    return a, b


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
