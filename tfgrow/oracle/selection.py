"""Which candidates to apply together: greedy selection on the interaction matrix.

Estimated changes do not add up: candidates learned independently pull the same way, so the best
ones by their individual scores overshoot when they are applied at once. Everything here therefore
works on the joint quadratic `change(S) = sum_S linear + 1/2 sum_SS gram` (`types.Interaction`).

What each of the `n` candidates would still change *given what is chosen already* is kept up to date
at every pick instead of being recomputed (see `quadratics`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tfgrow.oracle.limits import Limits
from tfgrow.oracle.quadratics import FixedLengths, FreeLengths
from tfgrow.types import Cost, Interaction

NEGLIGIBLE = 1e-3
"""A gain under this share of the best single one is none: a unit that never fires would cost
parameters and bring nothing."""


EXCHANGES = 8
"""How many of the best candidates that don't fit are tried together with removals."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Where a candidate belongs.

    Attributes:
      site: name of its site.
      excludes: candidates of one site with an equal key (two edits of the same unit) exclude each
        other; None excludes nothing.
      units: how many units the candidate adds to its site; negative if it takes some away.
      cost_class: candidates of one site with an equal class always cost the same, so the joint
        cost is asked for once per class; None when nothing is known.
    """

    site: str
    excludes: Hashable = None
    units: int = 1
    cost_class: Hashable = None


@dataclasses.dataclass(frozen=True)
class Selection:
    """A chosen set of candidates.

    Attributes:
      indices: the chosen candidates in the order they were picked.
      estimated_change: joint estimate of the change of the mean loss (negative is better).
      cost: joint extra cost of the set.
      marginal_gains: `-` change each index brought when it was added; with fixed lengths they sum
        to `-estimated_change`. Inside a `round_to` bundle single ones may be negative.
      lengths: at which each of them is to be applied.
      reason: why choosing stopped, in words.
    """

    indices: tuple[int, ...]
    estimated_change: float
    cost: Cost
    marginal_gains: tuple[float, ...]
    lengths: tuple[float, ...]
    reason: str


def select(
    interaction: Interaction,
    *,
    groups: Sequence[Group],
    widths: Mapping[str, int],
    cost_of: Callable[[tuple[int, ...]], Cost],
    limits: Limits | None = None,
    tie_break_seed: int = 0,
    conflicts: np.ndarray | None = None,
    least_lengths: np.ndarray | None = None,
) -> Selection:
    """Picks candidates greedily by marginal gain per marginal cost.

    Each step takes the candidate (with `round_to`: the bundle of candidates that brings one site
    to its next multiple) with the largest gain per unit of cost among those that lower the joint
    estimate noticeably (see `NEGLIGIBLE`). One that doesn't fit the limits is picked together with
    the removals that make room for it, and its gain is that of all of them. Removals for their own
    sake come last: what they gain is mostly what any edit would (the network is off its optimum
    while it trains), and what only new units could bring would be lost to sight behind it. Equal
    inputs give equal selections.

    Args:
      interaction: the joint quadratic over the `n` candidates.
      groups: per candidate, its site and what it excludes; length `n`.
      widths: units of every site now.
      cost_of: joint extra cost of a set of candidate indices (edits of neighbouring layers
        multiply); called with the chosen indices plus the tried ones.
      limits: the budget; unlimited by default.
      tie_break_seed: orders exactly equal candidates.
      conflicts: bool `[n, n]`, symmetric: which candidates can't be chosen together although they
        edit different units.
      least_lengths: candidates can be applied at any length from these `[n]` to 1, and those that
        are chosen get the ones that are best together, see `quadratics.FreeLengths`; None takes
        them at length 1.

    Returns:
      The selection, possibly empty; its `reason` says why it ends where it does.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, a site without a width, or
        `round_to` with candidates that add other than 0 or 1 unit.

    Example:

    >>> import numpy as np
    >>> from tfgrow.types import Cost, Interaction
    >>> twins = Interaction(np.array([-1.0, -0.9, -0.3]), np.array(
    ...     [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.1]]))
    >>> chosen = select(
    ...     twins, groups=[Group("conv1", 0), Group("conv1", 1), Group("conv2", 0)],
    ...     widths={"conv1": 4, "conv2": 4}, cost_of=lambda s: Cost(params=10 * len(s)))
    >>> chosen.indices, round(chosen.estimated_change, 2), chosen.reason
    ((0, 2), -0.75, 'no further candidate lowers the estimate')
    """
    limits = limits or Limits()
    _check(interaction, groups, widths, limits)
    search = _Search(
        interaction, groups, widths, cost_of, limits, tie_break_seed, conflicts, least_lengths
    )
    reason = None
    while reason is None:
        reason = search.step()
    lengths = search.quadratic.lengths(search.chosen, interaction)
    return Selection(
        indices=tuple(search.chosen),
        estimated_change=interaction.of(search.chosen).at(lengths).change(),
        cost=search.cost,
        marginal_gains=tuple(search.gains),
        lengths=tuple(lengths.tolist()),
        reason=reason,
    )


@dataclasses.dataclass
class _Options:
    """What could be picked next: `m` bundles with their marginal change and cost, each `[m]`."""

    members: list[tuple[int, ...]]
    change: np.ndarray
    params: np.ndarray
    flops: np.ndarray
    edits: np.ndarray


class _Pick(NamedTuple):
    """What could be picked next.

    Attributes:
      bundle: its candidates.
      rate: its gain per cost to the power that gains are compared by.
      per_cost: its gain per cost.
    """

    bundle: tuple[int, ...]
    rate: float
    per_cost: float


class _Search:
    """The running state of one greedy selection."""

    def __init__(
        self, interaction, groups, widths, cost_of, limits, tie_break_seed, conflicts, least
    ):
        quadratic = interaction.linear, np.asarray(interaction.gram, dtype=np.float64)
        self.quadratic = (
            FixedLengths(*quadratic) if least is None else FreeLengths(*quadratic, least)
        )
        self.negligible = -NEGLIGIBLE * np.min(self.quadratic.changes(), initial=0.0)
        self.groups = groups
        self.widths = dict(widths)
        self.cost_of = cost_of
        self.limits = limits
        self.bundled = (limits.round_to or 1) > 1
        self.priority = np.random.default_rng(tie_break_seed).permutation(len(groups))
        self.available = np.ones(len(groups), dtype=bool)
        self.exclusive = exclusion_ids(groups)
        self.conflicts = conflicts
        self.removes = np.array([group.units < 0 for group in groups], dtype=bool)
        self.available &= ~self._emptying(self.widths)
        self.by_site = _indices_by_site(groups)
        self.chosen: list[int] = []
        self.gains: list[float] = []
        self.cost = Cost()

    def step(self) -> str | None:
        """Picks once; returns why it could not, or None."""
        options = self._options()
        if not options.members:
            return self._why_no_options()
        lowering = options.change < -self.negligible
        if not lowering.any():
            return f"no {'further ' if self.chosen else ''}candidate lowers the estimate"
        fits = self._fits(options)
        affordable = lowering & np.logical_and.reduce(list(fits.values()))
        removing = np.array([bool(self.removes[bundle[0]]) for bundle in options.members])
        pick = self._best(options, affordable & ~removing)
        pick = self._exchange(options, lowering & ~affordable & ~removing, pick) or pick
        too_little = pick is not None and pick.per_cost < self.limits.min_gain_per_param
        if pick is None or too_little:
            pick = self._best(options, affordable & removing)
        if pick is not None:
            self._take(pick.bundle)
            return None
        if too_little:
            return (
                f"marginal gain per {self.limits.unit_name} fell under "
                f"{self.limits.min_gain_per_param:g}"
            )
        return self._why_nothing_fits({name: ok[lowering] for name, ok in fits.items()})

    def _options(self) -> _Options:
        if self.bundled:
            members, change = self._bundles()
        else:
            free = np.flatnonzero(self.available)
            members = [(int(i),) for i in free]
            change = self.quadratic.changes(free)
        params, flops = self._marginal_costs(members).T
        return _Options(members, change, params, flops, np.array([len(m) for m in members]))

    def _bundles(self) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """Per site the bundle that reaches its next multiple, and each widthless edit alone."""
        members: list[tuple[int, ...]] = []
        change: list[float] = []
        for site, indices in self.by_site.items():
            widening = [i for i in indices if self.groups[i].units]
            tries = [self._grow_bundle(widening, -self.widths[site] % self.limits.round_to)]
            if self.widths[site] % self.limits.round_to == 0:
                tries = [self._grow_bundle(widening, self.limits.round_to)]
                # An edit that adds no unit keeps a width that is a multiple already.
                tries += [self._grow_bundle([i], 1) for i in indices if not self.groups[i].units]
            for bundle, total in filter(None, tries):
                members.append(bundle)
                change.append(total)
        return members, np.array(change)

    def _grow_bundle(self, indices: list[int], size: int) -> tuple[tuple[int, ...], float] | None:
        """The best `size` candidates of `indices` jointly, greedily; None if there are fewer."""
        pool = np.array([i for i in indices if self.available[i]], dtype=int)
        rest, taken, total = self.quadratic.of(pool), [], 0.0
        free = np.ones(len(pool), dtype=bool)
        while len(taken) < size:
            if not free.any():
                return None
            change = np.where(free, rest.changes(), np.inf)
            pick = int(np.lexsort((self.priority[pool], change))[0])
            taken.append(int(pool[pick]))
            total += float(change[pick])
            rest.take(pick)
            free &= self.exclusive[pool] != self.exclusive[pool[pick]]
        return tuple(taken), total

    def _marginal_costs(
        self, members: list[tuple[int, ...]], beside: tuple[int, ...] = ()
    ) -> np.ndarray:
        """What each bundle adds to the cost of the chosen set, and of what is picked `beside` it.

        `[m, 2]`: parameters and FLOPs.
        """
        chosen = (*self.chosen, *beside)
        before = self.cost_of(chosen) if beside else self.cost
        known: dict[Hashable, tuple[int, int]] = {}
        extra = np.zeros((len(members), 2))
        for row, bundle in enumerate(members):
            key = self._cost_key(bundle)
            if key not in known:
                joint = self.cost_of((*chosen, *bundle))
                known[key] = joint.params - before.params, joint.flops - before.flops
            extra[row] = known[key]
        return extra

    def _cost_key(self, bundle: tuple[int, ...]) -> Hashable:
        group = self.groups[bundle[0]]
        if len(bundle) > 1 or group.cost_class is None:
            return bundle
        return group.site, group.cost_class

    def _fits(self, options: _Options) -> dict[str, np.ndarray]:
        """Per limit, which options stay within it."""
        spent = {"params": self.cost.params, "flops": self.cost.flops, "edits": len(self.chosen)}
        fits = {}
        for name, used in spent.items():
            limit = getattr(self.limits, name)
            extra = getattr(options, name)
            # What costs nothing is never in the way, even when the limit is zero.
            fits[name] = (extra <= 0) | (used + extra <= (math.inf if limit is None else limit))
        return fits

    def _rates(
        self, options: _Options, change: np.ndarray | float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gains per powered price and per cost, `[m]`."""
        change = options.change if change is None else change
        powered = np.maximum(self.limits.price(options), 1.0) ** self.limits.cost_exponent
        return -change / powered, -change / np.maximum(getattr(options, self.limits.unit), 1.0)

    def _costs_nothing(self, options: _Options) -> np.ndarray:
        """Which options neither have a price nor use up what is limited, `[m]`."""
        costs = self.limits.price(options) > 0
        for name in ("params", "flops"):
            if getattr(self.limits, name) is not None:
                costs |= getattr(options, name) > 0
        return ~costs

    def _best(self, options: _Options, among: np.ndarray) -> _Pick | None:
        """The option with the largest rate, then gain; what costs nothing goes first."""
        if not among.any():
            return None
        free = self._costs_nothing(options)
        rates, per_cost = (np.where(free, np.inf, rate) for rate in self._rates(options))
        first = np.array([self.priority[bundle[0]] for bundle in options.members])
        best = int(np.lexsort((first, options.change, -np.where(among, rates, -np.inf)))[0])
        return _Pick(options.members[best], float(rates[best]), float(per_cost[best]))

    def _exchange(self, options: _Options, wanted: np.ndarray, least: _Pick | None) -> _Pick | None:
        """The best of what doesn't fit, together with the removals that make room for it.

        What all of them gain together counts per cost of what is wanted, for that is the room it
        takes.

        Args:
          options: what could be picked.
          wanted: which of them are worth a try, `[m]`.
          least: has to be exceeded in rate.

        Returns:
          None if nothing does better than `least`.
        """
        if not self.removes.any():
            return None
        best = None
        rates, _ = self._rates(options)
        rows = np.flatnonzero(wanted)
        for row in rows[np.argsort(-rates[rows], kind="stable")][:EXCHANGES]:
            change = float(options.change[row])
            found = self._make_room(options.members[row], change, -float(self.negligible))
            if found is None:
                continue
            bundle, change = found
            pick = _Pick(bundle, *(float(rate[row]) for rate in self._rates(options, change)))
            if least is None or pick.rate > least.rate:
                best = least = pick
        return best

    def _make_room(
        self, bundle: tuple[int, ...], change: float, least: float
    ) -> tuple[tuple[int, ...], float] | None:
        """Adds the cheapest removals to a bundle until it fits; None if that costs too much."""
        gram, alone = self.quadratic.gram, 0.5 * np.diag(self.quadratic.gram)
        slope = self.quadratic.slope + gram[:, bundle].sum(axis=1)
        free, widths = self.available & self.removes, dict(self.widths)
        for i in bundle:
            free &= self._compatible(i)
        cost = self.cost_of((*self.chosen, *bundle))
        while exceeded := self.limits.exceeded(cost, len(self.chosen) + len(bundle)):
            pool = np.flatnonzero(free)
            if not len(pool) or change >= least or "edits" in exceeded:
                return None
            params, flops = self._marginal_costs([(int(i),) for i in pool], bundle).T
            freed = -(params if exceeded[0] == "params" else flops)
            price = (slope + alone)[pool] / np.maximum(freed, 1)
            pick = int(pool[np.lexsort((self.priority[pool], price))[0]])
            change += float(slope[pick] + alone[pick])
            bundle = (*bundle, pick)
            slope = slope + gram[:, pick]
            widths[self.groups[pick].site] += self.groups[pick].units
            free &= self._compatible(pick) & ~self._emptying(widths)
            cost = self.cost_of((*self.chosen, *bundle))
        return (bundle, change) if change < least else None

    def _emptying(self, widths: Mapping[str, int]) -> np.ndarray:
        """Which removals would leave their site without units, `[n]`."""
        last = np.array([widths[g.site] + g.units < 1 for g in self.groups], dtype=bool)
        return self.removes & last

    def _compatible(self, i: int) -> np.ndarray:
        """Which candidates may be chosen beside one, `[n]`."""
        compatible = self.exclusive != self.exclusive[i]
        return compatible if self.conflicts is None else compatible & ~self.conflicts[i]

    def _take(self, bundle: tuple[int, ...]) -> None:
        self.cost = self.cost_of((*self.chosen, *bundle))
        for i in bundle:
            self.gains.append(-float(self.quadratic.changes(i)))
            self.quadratic.take(i)
            self.chosen.append(i)
            self.available &= self._compatible(i)
            self.widths[self.groups[i].site] += self.groups[i].units
        self.available &= ~self._emptying(self.widths)

    def _why_no_options(self) -> str:
        if not len(self.groups):
            return "there is no candidate"
        if self.bundled and self.available.any():
            return f"no site has the candidates to reach a multiple of {self.limits.round_to}"
        return "every candidate is chosen or excluded by a chosen one"

    def _why_nothing_fits(self, fits: Mapping[str, np.ndarray]) -> str:
        blocking = [name for name, ok in fits.items() if not ok.any()]
        return self.limits.said(name for name in blocking or fits if not fits[name].all())


def exclusion_ids(groups: Sequence[Group]) -> np.ndarray:
    """An int `[n]`, equal where candidates exclude each other."""
    ids: dict[Hashable, int] = {}
    keys = [(g.site, i if g.excludes is None else (g.excludes,)) for i, g in enumerate(groups)]
    return np.array([ids.setdefault(key, len(ids)) for key in keys], dtype=int)


def _indices_by_site(groups: Sequence[Group]) -> dict[str, list[int]]:
    by_site: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        by_site.setdefault(group.site, []).append(i)
    return by_site


def _check(interaction, groups, widths, limits) -> None:
    count = len(groups)
    shapes = np.shape(interaction.linear), np.shape(interaction.gram)
    if shapes != ((count,), (count, count)):
        raise ValueError(
            f"{count} candidates need an interaction of shapes ({count},) and ({count}, {count}). "
            f"Found: {shapes[0]} and {shapes[1]}."
        )
    finite = np.isfinite(interaction.linear) & np.isfinite(interaction.gram).all(axis=1)
    if not finite.all():
        bad = sorted({groups[i].site for i in np.flatnonzero(~finite)})
        raise ValueError(
            f"The estimates of {int((~finite).sum())} of {count} candidates are not finite "
            f"(sites {bad}). Check the estimation data and the loss for NaN or overflow."
        )
    missing = sorted({g.site for g in groups} - set(widths))
    if missing:
        raise ValueError(f"No width given for the sites {missing}. Found: {sorted(widths)}.")
    odd = sorted({g.site for g in groups if g.units not in (0, 1)})
    if odd and (limits.round_to or 1) > 1:
        raise ValueError(
            f"round_to={limits.round_to} needs candidates that add 0 or 1 unit each; those of the "
            f"sites {odd} add others. Give single-unit candidates, or leave round_to out."
        )
