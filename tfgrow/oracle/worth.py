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

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tfgrow.estimator import GaussNewtonEstimator
from tfgrow.graph.cost import CostModel
from tfgrow.graph.sites import Site
from tfgrow.morphisms.base import Morphism
from tfgrow.oracle.data import GrowthData
from tfgrow.oracle.limits import Limits, up_to_multiple
from tfgrow.oracle.quadratics import FreeLengths
from tfgrow.types import Cost, Interaction

RETURNS = 2.0
"""With k times as many units, each is worth k to the minus this: the loss falls with one over them.

Measured on two VGGs on CIFAR-10 of other widths, six epochs in (docs/agreement.md), units and what
each is worth: 8 and 20 of the first convolution, 0.042 and 0.0053 (a power of 2.3); 5 and 8 of the
second, 0.27 and 0.097 (2.2); 16 and 20 of the third, 0.022 and 0.011 (3.0); 8 and 16 of the fourth,
0.066 and 0.015 (2.2); 24 and 32 of the fifth, 0.0045 and 0.0033 (1.1); 16 and 32 of the sixth,
0.0041 and 0.0009 (2.2).
"""

SPREAD = 0.5
"""Where only FLOPs count, units are compared by their worth to the power of this.

What training makes of wider layers differs less between layers than what units are worth, of which
it goes about with the root (docs/agreement.md: slopes of 0.4 and 0.5 on two networks). The cost in
FLOPs differs far more than that in parameters. On validation images (CIFAR-10, 8 MFLOPs, three
seeds) the root of the worth, per FLOP, has 65.1 % from scratch and 62.5 % as grown, the worth per
root of the FLOPs 63.3 and 62.5; under 20,000 parameters (one seed) 65.4 and 63.3, against 66.8 and
64.5.
"""

MOST_TIMES = 3
"""So many times as wide a site may become in one step: further that law is not trusted.

With 2, a step that doubles the network has no choice: every site doubles. Of 2, 3 and 4, 3 has the
best mean on validation images, by a few tenths (CIFAR-10, see `experiments.compare`; 10,000 and
20,000 parameters, as grown and from scratch, three seeds: 62.3, 62.9 and 62.7 %).
"""

AT_ONCE = 1 / 32
"""Share of a site's units that is added at a time: single ones to wide networks would take long."""

STUDIED = 128
"""Units of a site that are looked at, at most: time and memory go with their number."""

PRICE_RANGE, PRICE_ACCURACY = 1e3, 1.1
"""How far the price of FLOPs may be from what is left of both budgets, and to what factor it is
found."""

LEAST_WORTH = 1e-12
"""Units go where they are cheapest then, unless there is a threshold."""


def worth_by_site(
    estimator: GaussNewtonEstimator,
    sites: Sequence[Site],
    parts: GrowthData,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """By site, what one of its units is worth on average; see `GaussNewtonEstimator.worth`.

    Where units can't be taken away (it is the only one) they are worth as much as anywhere. Where
    all could go at no cost, next to nothing, all alike: the network has not learned anything yet.

    Of wide sites only some units are looked at.

    Args:
      estimator: of the model.
      sites: some whose widths can grow.
      parts: data.
      progress: called with (batches done, batches in all).
    """
    names = [site.name for site in sites]
    found = estimator.worth(parts.learn, parts.score, names, STUDIED, progress)
    means = {name: float(np.mean(some)) for name, some in found.items()}
    most = max(means.values(), default=1.0)
    return {name: means.get(name, most) if most > 0 else LEAST_WORTH for name in names}


@dataclasses.dataclass(frozen=True)
class Widening:
    """How sites may be widened.

    Attributes:
      worth: of a unit, by site.
      sites: the sites.
      costs: what units cost.
      most: by site, most units that can be added, see `most_units`.
    """

    worth: Mapping[str, float]
    sites: Sequence[Site]
    costs: CostModel
    most: Mapping[str, float]

    def allocate(self, limits: Limits) -> tuple[dict[str, int], str]:
        """How many units to add to which site, and why no more.

        One step after the other goes where the next unit is worth most for what it costs; of wide
        sites the next few, with `round_to` as many as reach a multiple. Some limit or `most` must
        end it.

        Args:
          limits: what may be spent.
        """
        steps = _Steps(self, limits)
        for _ in steps:
            pass
        taken = {name: count for name, count in steps.extra.items() if count}
        return taken, "; ".join(steps.in_the_way)

    def with_prices(self, limits: Limits, left: Limits) -> Limits:
        """`limits` with a price of FLOPs at which both of two budgets can be spent.

        About the least at which all parameters that are left would be spent before the FLOPs that
        are left are, by this and the steps to come: nothing, where FLOPs are no bound.

        Args:
          limits: of this step.
          left: of both budgets.
        """
        if left.params is None or left.flops is None or not limits.cost_exponent:
            return limits
        is_last = not limits.step and limits.edits is None
        unbounded = dataclasses.replace(self, most=dict.fromkeys(self.worth, math.inf))
        widening = self if is_last else unbounded
        all_params = dataclasses.replace(limits, params=left.params, flops=None, edits=None)
        most_flops = left.flops

        def suffice(price: float) -> bool:
            steps = _Steps(widening, dataclasses.replace(all_params, prices=(1.0, price)))
            return all(offer.cost.flops <= most_flops for offer in steps)

        if suffice(0.0):
            return limits
        even = max(left.params, 1) / max(left.flops, 1)
        too_low, enough = even / PRICE_RANGE, even * PRICE_RANGE
        if suffice(enough):
            while enough > PRICE_ACCURACY * too_low:
                middle = math.sqrt(too_low * enough)
                too_low, enough = (too_low, middle) if suffice(middle) else (middle, enough)
        return dataclasses.replace(limits, prices=(1.0, enough))


class _Steps:
    """The steps of `Widening.allocate`.

    Attributes:
      extra: units added so far, by site.
      in_the_way: why no further step can be taken, each once.
    """

    def __init__(self, widening: Widening, limits: Limits):
        self._widening, self._limits = widening, limits
        self._now = {site.name: site.units for site in widening.sites}
        self.extra: dict[str, int] = dict.fromkeys(widening.worth, 0)
        self.in_the_way: dict[str, None] = {}

    def __iter__(self) -> Iterator[_Offer]:
        # A site's rate only falls, whichever site grows (but for a smaller step at a limit): only
        # the foremost has to be known anew.
        worth = self._widening.worth
        waiting = [(-np.inf, place, name) for place, name in enumerate(worth) if worth[name] > 0]
        while waiting:
            _, place, name = heapq.heappop(waiting)
            offer = self._next_of(name)
            if offer is None:
                continue
            entry = (-offer.rate(self._limits), place, name)
            heapq.heappush(waiting, entry)
            if waiting[0] == entry:
                self.extra = offer.extra
                yield offer

    def _next_of(self, name: str) -> _Offer | None:
        """The next units of a site; None if it can't have any."""
        worth, costs, most = self._widening.worth, self._widening.costs, self._widening.most
        spread = SPREAD if self._limits.unit == "flops" else 1.0
        now, first = self._now[name], self.extra[name]
        spent = costs.extra(self.extra)
        for more in _steps(now + first, self._limits.round_to or 1):
            wider = {**self.extra, name: first + more}
            gain = worth[name] * _returns(now, first, wider[name])
            cost = costs.extra(wider)
            beside = Cost(cost.params - spent.params, cost.flops - spent.flops)
            offer = _Offer(name, more, gain, worth[name] ** (spread - 1), beside, wider, cost)
            reasons = offer.reasons(self._limits, most[name])
            if not reasons:
                return offer
        self.in_the_way.update(dict.fromkeys(reasons))
        return None


def _steps(units: int, multiple: int) -> list[int]:
    """By how many units a site may be widened next: the larger step, and the smallest."""
    least = up_to_multiple(units, multiple)
    more = int(AT_ONCE * units) // multiple * multiple
    return [least + more, least] if more else [least]


def _returns(now: int, first: int, last: int) -> float:
    """What units from one number of new ones to another are worth, in terms of those there are."""
    return sum((now / (now + k)) ** RETURNS for k in range(first, last))


@dataclasses.dataclass(frozen=True)
class _Offer:
    """The next units of a site.

    Attributes:
      site: its name.
      units: how many.
      gain: what they are worth together.
      weight: how much that counts when sites are compared, see `SPREAD`.
      beside: what they cost beside those before.
      extra: all units that would then be added, by site.
      cost: of all of them.
    """

    site: str
    units: int
    gain: float
    weight: float
    beside: Cost
    extra: dict[str, int]
    cost: Cost

    def rate(self, limits: Limits) -> float:
        """Weighted worth of one of them, on average, for its price to a power."""
        price = max(1, limits.price(self.beside))
        worth = self.weight * self.gain / self.units
        return worth / (price / self.units) ** limits.cost_exponent

    def reasons(self, limits: Limits, most: float) -> list[str]:
        """Why it can't be taken."""
        exceeded = limits.exceeded(self.cost, sum(self.extra.values()))
        found = [limits.said([name]) for name in exceeded]
        if self.extra[self.site] > most:
            found.append("one step makes no site wider than that")
        if self.gain / max(1, getattr(self.beside, limits.unit)) < limits.min_gain_per_param:
            least = f"{limits.min_gain_per_param:g}"
            found.append(f"worth per {limits.unit_name} fell under {least}")
        return found


def most_units(site: Site, kinds: Sequence[Morphism], at_least: int = 1, multiple: int = 1) -> int:
    """How many units some kinds of edits can add to a site in one step.

    Each unit is split once at most. Worth tells of the units there are, not of ten times as many:
    no site becomes more than `MOST_TIMES` times as wide, but narrow ones, and to reach a multiple.

    Args:
      site: a site.
      kinds: the kinds of edits.
      at_least: may always be added, if they can be made at all.
      multiple: widths are brought to multiples of this.
    """
    widening = [kind for kind in kinds if kind.units > 0 and kind.reason(site) is None]
    if not widening:
        return 0
    if all(kind.edits_unit for kind in widening):
        return site.units
    return max((MOST_TIMES - 1) * site.units, at_least, up_to_multiple(site.units, multiple))


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
    of_site = {name: np.array([site == name for site in sites]) for name in left}
    while free.any():
        best = int(np.argmin(np.where(free, rest.changes(), np.inf)))
        chosen.append(best)
        rest.take(best)
        free &= ~exclusive[best]
        free[best] = False
        left[sites[best]] -= 1
        if not left[sites[best]]:
            free &= ~of_site[sites[best]]
    return chosen
