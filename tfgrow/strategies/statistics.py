"""Statistics of new units that BatchNormalization keeps, by forward passes alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import keras

from tfgrow.capture.batches import Batch, mean_of_batches, size_of_batch
from tfgrow.capture.capture import observe
from tfgrow.capture.execute import float32_compute
from tfgrow.capture.path import needs_moments
from tfgrow.graph.nodes import trace
from tfgrow.morphisms.base import Candidate, perturb_all
from tfgrow.morphisms.registry import group_candidates


def measured(
    model: keras.Model, candidates: Sequence[Candidate], batches: Iterable[Batch]
) -> list[Candidate]:
    """Candidates with the statistics that their units have on some batches; theta is as it was.

    Args:
      model: the model they are of.
      candidates: units to come.
      batches: `(x, y, weights)`; only x is looked at.
    """
    found = list(candidates)
    if not found:
        return found
    groups, positions = group_candidates(model, found)
    groups_in_need = [
        (group, where)
        for group, where in zip(groups, positions, strict=True)
        if any(needs_moments(step) for step in group.path.steps)
    ]
    if not groups_in_need:
        return found
    some = [group for group, _ in groups_in_need]
    graph, seen, sizes = trace(model), [], []
    with float32_compute(model):
        for batch in batches:
            x, *_ = batch
            sizes.append(size_of_batch(batch))
            effects = perturb_all(observe(graph, x), some, [g.theta for g in some], fresh=True)
            seen.append([dict(effect.moments) for effect in effects])
    for number, (_, where) in enumerate(groups_in_need):
        names = seen[0][number]
        state = {n: mean_of_batches([one[number][n] for one in seen], sizes) for n in names}
        for row, position in enumerate(where):
            mine = {name: value[row] for name, value in state.items()}
            old = found[position]
            found[position] = old.replace(state={**old.state, **mine})
    return found
