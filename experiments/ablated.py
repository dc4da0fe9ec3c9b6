"""Gauss-Newton growth with a part of the method taken out, to see what the part is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import tfgrow


class Ablated(tfgrow.GaussNewtonOracle):
    """A `GaussNewtonOracle` without one of its precautions.

    Args:
      joint: False takes every candidate's gain for its own: what two of them share counts twice.
      cross_fitted: False scores candidates on the very batches they were learned on.
      **kwargs: what `GaussNewtonOracle` takes.
    """

    def __init__(self, *args: Any, joint: bool = True, cross_fitted: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.joint = joint
        self.cross_fitted = cross_fitted

    def split(self, dataset: Any) -> Any:
        """Disjoint batches of a dataset, or the same to learn and to score on."""
        data = super().split(dataset)
        return data if self.cross_fitted else dataclasses.replace(data, score=data.learn)

    def interaction(self, estimator: Any, learned: Sequence[Any], batches: Any) -> Any:
        """The quadratic over the candidates, or only what each does by itself."""
        found = super().interaction(estimator, learned, batches)
        if self.joint:
            return found
        return dataclasses.replace(found, gram=np.diag(np.diag(found.gram)))

    def estimate(self, model: Any, candidates: Sequence[Any], batches: Any) -> float | None:
        """Of the candidates at once, or the sum over each by itself."""
        if self.joint:
            return super().estimate(model, candidates, batches)
        estimator = tfgrow.GaussNewtonEstimator(model, curvature=self.curvature, seed=self.seed)
        return self.interaction(estimator, candidates, batches).change()


def make(name: str, growing: Any, seed: int) -> Ablated:
    """The oracle of a variant, in memory only."""
    if name != "gauss_newton":
        raise ValueError(f"Only gauss_newton has variants. Found: {name!r}")
    return Ablated("val_loss", seed=seed, **growing.oracle)
