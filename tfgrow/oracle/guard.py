"""The guard: a chosen set is committed at a scale at which it really does not raise the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import keras

from tfgrow.growth import edits_of
from tfgrow.morphisms.base import Candidate
from tfgrow.morphisms.registry import get
from tfgrow.surgery.apply import apply_edits
from tfgrow.surgery.transaction import growth_transaction
from tfgrow.types import LayerChange

ALPHAS = (1.0, 0.5, 0.25, 0.125)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a chosen set.

    Attributes:
      alpha: the committed scale; 0 if none would do, and the model is as before.
      candidates: the candidates at that scale.
      changes: what was changed, by layer.
      loss_before, loss_after: mean loss on the held-out batches.
      estimated_change: estimate at the committed scale, if one was asked for and made.
    """

    alpha: float
    candidates: tuple[Candidate, ...]
    changes: tuple[LayerChange, ...]
    loss_before: float
    loss_after: float
    estimated_change: float | None = None


def commit(
    model: keras.Model,
    candidates: Sequence[Candidate],
    loss_of: Callable[[keras.Model], float],
    tolerance: float = 0.0,
    alphas: Sequence[float] = ALPHAS,
    estimate_of: Callable[[Sequence[Candidate]], float | None] | None = None,
    fits: Callable[[Sequence[Candidate]], bool] | None = None,
    loss_before: float | None = None,
) -> Outcome:
    """Applies a set at the largest scale that doesn't raise the held-out loss, or not at all.

    Args:
      model: the model to edit in place.
      candidates: the set.
      loss_of: the model's loss on held-out batches, by its real forward pass.
      tolerance: by how much the loss may rise.
      alphas: scales to try, in this order; at 0 every morphism preserves the function.
      estimate_of: estimates a scaled set on the model as it was. Called once, and only if the set
        is committed at another scale than 1, at which its estimate is known.
      fits: whether the model stays within its budget with some of the set.
      loss_before: the model's loss as it is, if it is known.

    Returns:
      The outcome. On any error the model is as before.

    Raises:
      ValueError: the loss is not finite before anything is changed.
    """
    before = after = loss_of(model) if loss_before is None else loss_before
    if not math.isfinite(before):
        raise ValueError(
            f"The loss of model '{model.name}' on the held-out batches is {before} before it "
            "grows. Check the data for NaN, or lower the learning rate of the training."
        )
    for alpha in alphas:
        scaled = _scaled(candidates, alpha)
        left_out = len(scaled) < len(candidates)
        if scaled and left_out and fits is not None and not fits(scaled):
            scaled = _scaled(candidates, alpha, whole=True)
        if not scaled:
            continue
        with growth_transaction(model) as attempt:
            changes = _applied(model, scaled)
            after = loss_of(model)
            if not after <= before + tolerance:  # true for NaN too
                attempt.rollback()
                continue
            estimate = None
            if alpha != 1.0 and estimate_of is not None:
                attempt.rollback()
                estimate = estimate_of(scaled)
                changes = _applied(model, scaled)
            return Outcome(alpha, tuple(scaled), tuple(changes), before, after, estimate)
    return Outcome(0.0, (), (), before, after)


def _applied(model: keras.Model, candidates: Sequence[Candidate]) -> list[LayerChange]:
    """Applies candidates as the next step of training would leave them: within constraints."""
    changes = apply_edits(model, edits_of(candidates))
    for change in changes:
        for variable, _ in change.edited():
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
    return changes


def _scaled(candidates: Sequence[Candidate], alpha: float, whole: bool = False) -> list[Candidate]:
    """The candidates at a scale.

    What can't be scaled is left out, or stays as it is if `whole`: removals make room for the rest.
    """
    if alpha == 1.0:
        return list(candidates)
    scaled = [(one, get(one.morphism).scaled(one, alpha)) for one in candidates]
    return [smaller or one for one, smaller in scaled if whole or smaller is not None]
