"""GaussNewtonOracle: proposes the edits that the Gauss-Newton estimate likes best."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tfgrow._checks import require_whole
from tfgrow.curvature.stand_in import STANDS_IN
from tfgrow.estimator import SETTLE, GaussNewtonEstimator
from tfgrow.graph.cost import CostModel
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import Site, sites_of
from tfgrow.morphisms.base import Candidate
from tfgrow.morphisms.registry import (
    apart,
    at_lengths,
    edits_of_sites,
    get,
    joint_cost,
    new_widths,
    open_sites,
    several,
    why_closed,
)
from tfgrow.oracle.base import GrowthOracle
from tfgrow.oracle.data import GrowthData, check_data, split_data
from tfgrow.oracle.limits import Limits, up_to_multiple
from tfgrow.oracle.selection import Group, exclusion_ids, select
from tfgrow.oracle.worth import Widening, most_units, pick, worth_by_site
from tfgrow.types import Cost, Interaction, Plan

SCORES = ("auto", "raw", "marginal", "worth")

ROOT = 0.5
"""What units are worth is compared per root of their parameters; see `docs/ablation.md`."""

SETTLING_SHARE = 0.6
"""Of the batches to learn on, so many tell the step of the weights there are, others its length."""

LEAST_LENGTH = 1 / 16
"""The halves of a split unit part by so much of what was learned, at the least."""


class GaussNewtonOracle(GrowthOracle):
    """Proposes, at each growth step, the set of morphisms that lowers the loss most for its cost.

    Every step makes candidates, learns their parameters on a stream of batches, scores them on
    batches they did not see, and picks a set by their interaction matrix, within the budget (Lawton
    et al., arXiv 2411.05855; the joint selection is ours). By default what the units there are are
    worth says first how many go where; `score` has the others.

    It is a `keras_tuner.Oracle`: each growth step is a trial in `directory/project_name`.

    Args:
      objective: name of the metric that ranks the trials.
      morphisms: kinds of edits to consider. With `"prune"` among them the network reshapes itself
        within its budget, and growing ends at `max_trials` only. `"heads"`, `"add_heads"` and
        `"prune_heads"` are those of attention, whose units are heads.
      curvature: see `GaussNewtonEstimator`. For the time one batch of exact columns takes, three
        batches of sampled ones are learned or scored on, which is worth more.
      new_units: single new units tried per site and step; with `score="worth"`, so many more than
        are wanted, and so many a site may always get.
      learn_steps: learning steps per growth step, one batch each.
      score_batches: batches that candidates are scored on.
      held_out_batches: batches on which a chosen set is judged before it is committed.
      learning_rate: of theta, see `GaussNewtonEstimator.learn`.
      score: `"worth"` adds units where those that are there are worth most for what they cost,
        whatever new ones change at once (see `GaussNewtonEstimator.worth`); no site becomes more
        than three times as wide then, but for narrow ones (`new_units` more), and
        `min_gain_per_param` is what a unit must be worth. With two budgets FLOPs count beside
        parameters as far as both can be spent so. `"raw"` goes by what an edit would do to the loss
        now; `"marginal"` by what it would do beyond what training the weights that are there would
        bring anyway (see `GaussNewtonEstimator.settle`; cf. Verbockhaven et al. 2024), and applies
        what is chosen at the lengths that are best together now. `"worth"` shares out a budget
        until it is spent; by what edits bring, growing ends where they bring nothing. So `"auto"`
        is `"worth"` where all kinds of edits add single units, there is a budget (`max_params` or
        `max_flops`) and no `min_gain_per_param`, and else `"raw"`.
      cost_exponent: gains are compared per cost to the power of this, from 0 (as they are) to 1
        (per parameter, or per FLOP if `max_flops` is the only budget); by default 0.5 of what units
        are worth unless only FLOPs count, else 1.
      growth_per_step: a fraction is the most parameters one step may add, relative to those the
        model has (by default it may double: units that come late learn little); a whole number is
        the most edits.
      **kwargs: budget (`max_params`, `max_flops`, `min_gain_per_param`, `round_to`), choice of
        sites (`include`, `exclude`), `seed`, `directory`, `project_name`, `overwrite`,
        `max_trials`: see `tfgrow.oracle.base.GrowthOracle`.

    Example:

    >>> import tfgrow
    >>> oracle = tfgrow.GaussNewtonOracle(max_params=60_000, morphisms=("split", "add"), seed=1)
    >>> oracle.max_params
    60000
    """

    def __init__(
        self,
        objective: Any = "val_loss",
        morphisms: Sequence[str] = ("split", "add"),
        *,
        curvature: str = "sampled",
        new_units: int = 4,
        learn_steps: int = 8,
        score_batches: int = 16,
        held_out_batches: int = 8,
        learning_rate: float = 0.1,
        growth_per_step: int | float | None = 1.0,
        score: str = "auto",
        cost_exponent: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(objective=objective, growth_per_step=growth_per_step, **kwargs)
        self.morphisms = tuple(several(morphisms))
        self._removes = any(kind.units < 0 for kind in self.morphisms)
        others = [kind.name for kind in self.morphisms if kind.units != 1]
        if others and (self._limits.round_to or 1) > 1:
            raise ValueError(
                f"round_to={self._limits.round_to} works with morphisms that add single units; "
                f"found {[kind.name for kind in self.morphisms]}. Leave out round_to, or {others}."
            )
        if not (isinstance(learning_rate, (int, float)) and 0 < learning_rate < math.inf):
            raise ValueError(f"learning_rate must be a finite number > 0. Found: {learning_rate!r}")
        if curvature not in ("auto", "exact", "sampled", "empirical"):
            raise ValueError(
                f"Unknown curvature {curvature!r}; expected 'auto', 'exact', 'sampled' or "
                "'empirical'."
            )
        for name, value in (("new_units", new_units), ("learn_steps", learn_steps),
                            ("score_batches", score_batches),
                            ("held_out_batches", held_out_batches)):  # fmt: skip
            require_whole(name, value)
        self.score = self._score(score, others)
        if cost_exponent is None:
            cost_exponent = ROOT if self.score == "worth" and not self.counts_flops else 1.0
        self._limits = dataclasses.replace(self._limits, cost_exponent=cost_exponent)
        self.cost_exponent = cost_exponent
        self.curvature = curvature
        self.new_units = new_units
        self.learn_steps = learn_steps
        self.score_batches = score_batches
        self.held_out_batches = held_out_batches
        self.learning_rate = learning_rate

    def _score(self, score: str, others: Sequence[str]) -> str:
        """What the oracle goes by; `others` are the kinds that don't add single units."""
        if score not in SCORES:
            raise ValueError(f"Unknown score {score!r}; expected one of {SCORES}.")
        budget = not (self.max_params is self.max_flops is None)
        if score == "auto":
            shared_out = budget and not others and not self._limits.min_gain_per_param
            return "worth" if shared_out else "raw"
        whole = [kind.name for kind in self.morphisms if kind.units < 0]
        if score == "marginal" and whole:
            raise ValueError(
                f"score='marginal' needs edits that can be applied in part; {whole} can't. Leave "
                "them out, or use score='raw'."
            )
        if score == "worth" and others:
            raise ValueError(
                f"score='worth' says where single units are to be added; {others} do something "
                "else. Leave them out, or use score='raw'."
            )
        if score == "worth" and self.growth_per_step is None and not budget:
            raise ValueError(
                "score='worth' shares out what a step may spend, and nothing limits it. Give "
                "growth_per_step, max_params or max_flops."
            )
        return score

    def check(self, model: keras.Model, data: Any) -> None:
        """Also checks the loss, and some batches of the data against model and loss."""
        super().check(model, data)
        check_data(GaussNewtonEstimator(model, curvature=self.curvature), data)

    def split(self, dataset) -> GrowthData:
        """Disjoint batches of a dataset for one growth step."""
        if isinstance(dataset, GrowthData):
            return dataset
        learn = self.learn_steps + SETTLE
        return split_data(
            dataset, learn, self.score_batches, self.held_out_batches, seed=self.next_seed()
        )

    def propose_plan(
        self,
        model: keras.Model,
        data: Any,
        *,
        epoch: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Plan:
        """Learns, scores and selects; see the class. `data` is a dataset or a `GrowthData`."""
        del epoch
        clock = _Clock()
        parts = self.split(data)
        graph = trace(model)
        every = self.open_sites(sites_of(model, graph))
        costs = CostModel(graph, every)
        names = set(self.site_names([site.names for site in every]))
        smallest = min((cost.params for cost in self._smallest(every, costs)), default=0)
        limits = self.limits(model.count_params(), costs.base.flops, smallest)
        sites = [site for site in every if site.name in names]
        step = _Step(model, sites, costs, limits, parts, self.next_seed(), clock, progress)
        return self._by_worth(step) if self.score == "worth" else self._by_gain(step)

    def _by_gain(self, step: _Step) -> Plan:
        """What is estimated to change the loss most for its cost, now or beyond training."""
        clock, parts, limits = step.clock, step.parts, step.limits
        every = self._candidates(step, {site.name: self.new_units for site in step.sites})
        candidates = [c for c in every if self._removes or limits.allow(c.cost)]
        if not candidates:
            return _plan((), 0.0, step, _why_none([one.cost for one in every], limits))
        estimator = self._estimator(step)
        clock.lap("prepare")
        if self.score == "marginal":
            estimator.settle(*_parted(parts.learn))
            clock.lap("settle")
        learned = self._learned(estimator, candidates, step)
        interaction = self.interaction(estimator, learned, parts.score)
        clock.lap("score")
        selection = select(
            interaction,
            groups=[_group(candidate) for candidate in learned],
            widths={site.name: site.units for site in step.sites},
            cost_of=lambda chosen: joint_cost(step.costs, [learned[i] for i in chosen]),
            limits=limits,
            tie_break_seed=step.seed,
            conflicts=_conflicts(learned),
            least_lengths=_least_lengths(learned) if self.score == "marginal" else None,
        )
        clock.lap("select")
        chosen = tuple(learned[i] for i in selection.indices)
        estimated = selection.estimated_change
        if self.score == "marginal" and chosen:
            # what was learned for settled weights may point uphill now
            here = self._estimator(step).interaction(chosen, parts.score)
            chosen = _at_lengths(chosen, here)
            estimated = self.estimate(step.model, chosen, parts.score) or 0.0
            clock.lap("lengths")
        return _plan(chosen, estimated, step, selection.reason)

    def _by_worth(self, step: _Step) -> Plan:
        """As many units as are wanted where units are worth most, whatever they change now."""
        clock, parts = step.clock, step.parts
        estimator = self._estimator(step)
        first = _shifted(step.progress, after=self.learn_steps + SETTLE)
        worth = worth_by_site(estimator, step.sites, parts, first)
        most = {
            site.name: most_units(site, self.morphisms, self.new_units, step.limits.round_to or 1)
            for site in step.sites
        }
        widening = Widening(worth, step.sites, step.costs, most)
        left = self._budget_left(step.model, step.costs)
        wanted, reason = widening.allocate(widening.with_prices(step.limits, left))
        clock.lap("worth")
        if not wanted:
            return _plan((), 0.0, step, reason)
        tried = {name: count + self.new_units for name, count in wanted.items()}
        rest = dataclasses.replace(step, progress=_shifted(step.progress, before=SETTLE))
        learned = self._learned(estimator, self._candidates(step, tried), rest)
        interaction = self.interaction(estimator, learned, parts.score)
        clock.lap("score")
        least, exclusive = _least_lengths(learned), _exclusive(learned)
        indices = pick(interaction, [one.site.name for one in learned], wanted, least, exclusive)
        chosen = _at_lengths([learned[i] for i in indices], interaction.of(indices))
        clock.lap("select")
        estimated = self.estimate(step.model, chosen, parts.score) or 0.0
        clock.lap("lengths")
        if not estimated < 0:
            return _plan((), 0.0, step, "no set of new units lowers the estimate")
        return _plan(chosen, estimated, step, reason)

    def _candidates(self, step: _Step, new_units: Mapping[str, int]) -> list[Candidate]:
        """Every smallest edit of the sites that are named, with so many new units each."""
        sites = [site for site in step.sites if site.name in new_units]
        return edits_of_sites(sites, self.morphisms, step.costs, new_units, step.seed)

    def _learned(
        self, estimator: GaussNewtonEstimator, candidates: Sequence[Candidate], step: _Step
    ) -> list[Candidate]:
        learned = estimator.learn(
            candidates,
            step.parts.learn,
            self.learn_steps,
            self.learning_rate,
            progress=step.progress,
        )
        step.clock.lap("learn")
        return learned

    def _estimator(self, step: _Step) -> GaussNewtonEstimator:
        return GaussNewtonEstimator(step.model, curvature=self.curvature, seed=step.seed)

    def interaction(
        self, estimator: GaussNewtonEstimator, learned: Sequence[Candidate], batches: Any
    ) -> Interaction:
        """What the selection goes by; a subclass may look at candidates in another way."""
        return estimator.interaction(learned, batches)

    def estimate(
        self, model: keras.Model, candidates: Sequence[Candidate], batches: Any
    ) -> float | None:
        """Joint estimate of some candidates on batches, for instance scaled down by the guard."""
        estimator = GaussNewtonEstimator(model, curvature=self.curvature, seed=self.seed)
        return estimator.joint_change(candidates, batches)

    def _why_stopped(self, model: keras.Model) -> str | None:
        """Also when there is some budget left, but not enough for the smallest edit.

        Never where units can be taken away too: the network can be reshaped within its budget.
        """
        if self._removes:
            return self._why_out_of_trials()
        reason = super()._why_stopped(model)
        if reason or (self.max_params is None and self.max_flops is None):
            return reason
        graph = trace(model)
        sites = self.open_sites(sites_of(model, graph))
        costs = CostModel(graph, sites)
        left = self._budget_left(model, costs)
        smallest = self._smallest(sites, costs)
        if any(left.allow(cost) for cost in smallest):
            return None
        return f"budget reached: {_why_none(smallest, left)}"

    def _budget_left(self, model: keras.Model, costs: CostModel) -> Limits:
        return Limits(
            params=_left(self.max_params, model.count_params()),
            flops=_left(self.max_flops, costs.base.flops),
        )

    def open_sites(self, sites: Sequence[Site]) -> list[Site]:
        """The sites at which one of the oracle's kinds of edits is possible."""
        return open_sites(sites, self.morphisms)

    def why_closed(self, site: Site) -> str:
        """Why none of the oracle's kinds of edits is possible at a site."""
        return why_closed(site, self.morphisms)

    def _smallest(self, sites: Sequence[Site], costs: CostModel) -> list[Cost]:
        """What the smallest edits cost: to bring a site to its next allowed width, and others."""
        multiple = self._limits.round_to or 1
        names = set(self.site_names([site.names for site in sites]))
        smallest = []
        for site in (site for site in sites if site.name in names):
            for kind in (kind for kind in self.morphisms if kind.reason(site) is None):
                if kind.units > 0:
                    smallest.append(costs.extra({site.name: up_to_multiple(site.units, multiple)}))
                elif kind.units == 0:
                    every = kind.candidates(site, new_units=1, seed=0)
                    smallest += [joint_cost(costs, [candidate]) for candidate in every]
        return smallest


def _least_lengths(candidates: Sequence[Candidate]) -> np.ndarray:
    """Edits that are linear in their length (those with a closed form) can be turned round.

    Others keep a little of theirs, or the halves of a split unit would never part.
    """
    return np.array([-1.0 if get(one.morphism).solved else LEAST_LENGTH for one in candidates])


def _parted(batches: Sequence) -> tuple[Sequence, Sequence]:
    """Batches to learn the step of the weights there are on, and others for its length."""
    most = math.ceil(SETTLING_SHARE * len(batches))
    return batches[:most], batches[most:] or batches


def _at_lengths(chosen: Sequence[Candidate], interaction: Interaction) -> tuple[Candidate, ...]:
    """Candidates at the lengths that are best together."""
    lengths = interaction.best_lengths(least=_least_lengths(chosen), most=1.0)
    return tuple(at_lengths(chosen, lengths))


class _Clock:
    """Seconds per phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """What one proposal is about."""

    model: keras.Model
    sites: Sequence[Site]
    costs: CostModel
    limits: Limits
    parts: GrowthData
    seed: int
    clock: _Clock
    progress: Callable[[int, int], None] | None


def _shifted(
    progress: Callable[[int, int], None] | None, before: int = 0, after: int = 0
) -> Callable[[int, int], None] | None:
    """Reports the progress of a part, so many batches being before and after it."""
    if progress is None:
        return None
    report = progress
    return lambda done, total: report(before + done, before + total + after)


def _plan(chosen: Sequence[Candidate], estimated: float, step: _Step, reason: str) -> Plan:
    return Plan(
        candidates=tuple(chosen),
        estimated_change=estimated,
        cost=joint_cost(step.costs, chosen),
        widths=new_widths(chosen),
        seconds=step.clock.seconds,
        reason=reason,
    )


def _group(candidate: Candidate) -> Group:
    """Two edits of one old unit exclude each other; what is new excludes nothing."""
    kind = get(candidate.morphism)
    return Group(
        site=candidate.site.name,
        excludes=candidate.unit if kind.edits_unit else None,
        units=kind.units,
        cost_class=(candidate.morphism, kind.group_key(candidate)),
    )


def _exclusive(candidates: Sequence[Candidate]) -> np.ndarray:
    """Which of them can't be applied beside each other, bool `[n, n]`."""
    same = exclusion_ids([_group(candidate) for candidate in candidates])
    return apart(candidates) | (same[:, None] == same)


def _conflicts(candidates: Sequence[Candidate]) -> np.ndarray | None:
    """Candidates that can't be applied at once, bool `[n, n]`; None if there are none.

    Removals of one site, one of which would stand in for the other, are among them.
    """
    conflicts = apart(candidates)
    by_site: dict[str, list[int]] = {}
    for row, candidate in enumerate(candidates):
        if get(candidate.morphism).units < 0:
            by_site.setdefault(candidate.site.name, []).append(row)
    for rows in by_site.values():
        units = [candidates[row].unit for row in rows]
        shares = np.array(
            [get(candidates[row].morphism).reliance(candidates[row], units) for row in rows]
        )
        conflicts[np.ix_(rows, rows)] = (shares > STANDS_IN) | (shares.T > STANDS_IN)
    return conflicts if conflicts.any() else None


def _left(budget: int | None, used: int) -> int | None:
    return None if budget is None else max(0, budget - used)


def _why_none(every: Sequence[Cost], limits: Limits) -> str:
    if not every:
        return "there is no candidate"
    smallest = min(every, key=lambda cost: (cost.params, cost.flops))
    left = [
        f"{limit} {unit}"
        for limit, unit in ((limits.params, "parameters"), (limits.flops, "FLOPs"))
        if limit is not None
    ]
    return (
        f"the smallest edit adds {smallest.params} parameters and {smallest.flops} FLOPs, and only "
        f"{' and '.join(left)} may be added"
    )
