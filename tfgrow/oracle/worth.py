"""Where capacity is missing: in layers whose units are worth much.

What a new unit would change now says little of what it will be good for: it has not learned
anything yet. What the units that are there would be missed by, the others standing in for them,
says what has come of the capacity there is, and the returns of more diminish. So a unit's worth is
what its removal is estimated to cost, and units go where they are worth most for what they cost.

The gradient is left out of it: while a network trains, most of what any edit changes along the
gradient is what the next steps of training change too, and it hides the rest.

Source: worth of a unit as in Optimal Brain Surgeon (Hassibi & Stork 1993), for whole units, in the
Gauss-Newton metric of Lawton et al., arXiv 2411.05855; widths by what units are worth are in the
spirit of MorphNet (Gordon et al. 2018, arXiv 1711.06798). That growth goes by it is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tfgrow.estimator import GaussNewtonEstimator
from tfgrow.graph.cost import CostModel
from tfgrow.graph.sites import Site
from tfgrow.morphisms.base import Morphism
from tfgrow.morphisms.registry import MORPHISMS
from tfgrow.oracle.data import GrowthData
from tfgrow.oracle.quadratics import FreeLengths
from tfgrow.oracle.selection import Limits
from tfgrow.types import Interaction

RETURNS = 2.0
"""With k times as many units, each is worth k to the minus this: the loss falls with one over them.

Measured on VGGs on CIFAR-10, six epochs in: 8 -> 20 units of the first convolution, worth 0.053 ->
0.010 each (1.8); 5 -> 8 -> 20 of the second, 0.31 -> 0.133 -> 0.014 (1.8, 2.4); 8 -> 16 of the
fourth, 0.064 -> 0.019 (1.8); 16 -> 23 -> 32 of the sixth, 0.0052 -> 0.0022 -> 0.0010 (2.3).
"""

LEAST_WORTH = 1e-12
"""Any threshold is above it, and it says where units are cheapest."""


def worth_of_units(
    estimator: GaussNewtonEstimator, sites: Sequence[Site], parts: GrowthData
) -> dict[str, float]:
    """By site, by how much the mean loss would rise if one of its units went, on average.

    Where units can't be taken away (it is the only one) they are worth as much as anywhere. Where
    all could go at no cost, next to nothing, all alike: the network has hardly learned anything.

    Args:
      estimator: one that takes the network for trained (`at_minimum`).
      sites: some whose widths can grow.
      parts: data.
    """
    removals = [
        removal
        for site in sites
        for kind in MORPHISMS.values()
        if kind.units < 0 and kind.reason(site) is None
        for removal in kind.candidates(site, new_units=1, seed=0)
    ]
    if not removals:
        return {site.name: LEAST_WORTH for site in sites}
    learned = estimator.learn(removals, parts.learn, steps=0)
    changes = estimator.interaction(learned, parts.score).scores
    by_site: dict[str, list[float]] = {}
    for removal, change in zip(removals, changes, strict=True):
        by_site.setdefault(removal.site.name, []).append(float(change))
    means = {name: float(np.mean(some)) for name, some in by_site.items()}
    most = max(means.values())
    if not most > 0:
        return {site.name: LEAST_WORTH for site in sites}
    return {site.name: means.get(site.name, most) for site in sites}


def allocate(
    worth: Mapping[str, float],
    sites: Sequence[Site],
    costs: CostModel,
    limits: Limits,
    most: Mapping[str, float],
) -> tuple[dict[str, int], str]:
    """How many units to add to which site, and why no more.

    One step after the other goes where the next units (with `round_to`, as many as reach the next
    multiple) are worth most for what they cost.

    Args:
      worth: of a unit, by site.
      sites: the sites.
      costs: what units cost.
      limits: what may be spent.
      most: by site, most units that can be added.
    """
    now, extra = {site.name: site.units for site in sites}, dict.fromkeys(worth, 0)
    open_to = [name for name in worth if worth[name] > 0]
    reason = "no unit that is there is worth anything"
    while open_to:
        spent, rates = getattr(costs.extra(extra), limits.unit), {}
        for name in list(open_to):
            units = now[name] + extra[name]
            more = -units % (limits.round_to or 1) or (limits.round_to or 1)
            trial = {**extra, name: extra[name] + more}
            cost = costs.extra(trial)
            if trial[name] > most[name] or not limits.allow(cost, sum(trial.values())):
                open_to.remove(name)
                reason = "no further unit fits the budget"
                continue
            gain = sum((now[name] / (units + k)) ** RETURNS for k in range(more)) * worth[name]
            rates[name] = gain, max(1, getattr(cost, limits.unit) - spent), more
        if not rates:
            break
        best = max(rates, key=lambda name: rates[name][0] / rates[name][1] ** limits.cost_exponent)
        gain, cost, more = rates[best]
        if gain / cost < limits.min_gain_per_param:
            unit = "parameter" if limits.unit == "params" else "FLOP"
            open_to.remove(best)
            reason = f"a unit's worth per {unit} fell under {limits.min_gain_per_param:g}"
            continue
        extra[best] += more
    return {name: count for name, count in extra.items() if count}, reason


def most_units(site: Site, kinds: Sequence[Morphism]) -> float:
    """How many units some kinds of edits can add to a site: each unit is split once at most."""
    widening = [kind for kind in kinds if kind.units > 0 and kind.reason(site) is None]
    if not widening:
        return 0
    return site.units if all(kind.edits_unit for kind in widening) else np.inf


def pick(
    interaction: Interaction,
    sites: Sequence[str],
    wanted: Mapping[str, int],
    least: np.ndarray,
    exclusive: np.ndarray,
) -> list[int]:
    """As many candidates of each site as are wanted, always the one that is best beside the others.

    Args:
      interaction: of the candidates.
      sites: to which each of them adds a unit.
      wanted: units by site.
      least: least lengths, see `FreeLengths`.
      exclusive: bool `[n, n]`, which candidates exclude each other.
    """
    rest = FreeLengths(interaction.linear, np.asarray(interaction.gram, np.float64), least)
    left, free = dict(wanted), np.ones(len(sites), dtype=bool)
    chosen: list[int] = []
    while free.any():
        best = int(np.argmin(np.where(free, rest.changes(), np.inf)))
        free[best] = False
        if left[sites[best]]:
            left[sites[best]] -= 1
            chosen.append(best)
            rest.take(best)
            free &= ~exclusive[best]
    return chosen
