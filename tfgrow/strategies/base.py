"""What strategies share that widen sites by whole units."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np

from tfgrow._checks import require_whole
from tfgrow.estimator import GaussNewtonEstimator
from tfgrow.graph.cost import CostModel
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import Site, sites_of
from tfgrow.morphisms.base import Candidate
from tfgrow.morphisms.registry import candidates as make_candidates
from tfgrow.morphisms.registry import joint_cost, new_widths
from tfgrow.oracle.base import GrowthOracle
from tfgrow.oracle.data import GrowthData, check_data, split_data
from tfgrow.oracle.limits import Limits, up_to_multiple
from tfgrow.strategies.statistics import measured
from tfgrow.types import Plan


@dataclasses.dataclass(frozen=True, eq=False)
class Room:
    """Where one step may add units, and how many.

    Attributes:
      model: the live model.
      sites: those that may grow, by name.
      costs: what more units cost.
      limits: the most that may be spent.
      seed: of the step.
      data: batches of the step.
    """

    model: keras.Model
    sites: Mapping[str, Site]
    costs: CostModel
    limits: Limits
    seed: int
    data: GrowthData

    def fits(self, extra: Mapping[str, int]) -> bool:
        """Whether so many more units (by site) are within the limits."""
        return self.limits.allow(self.costs.extra(extra), sum(extra.values()))

    def next_width(self, site: str, extra: int) -> int:
        """The next allowed width of a site that is to have so many more units: by `round_to`."""
        multiple = self.limits.round_to or 1
        width = self.sites[site].units + extra
        return width + up_to_multiple(width, multiple)

    def new_units(self, extra: Mapping[str, int]) -> list[Candidate]:
        """So many new units: random incoming weights, outgoing ones of zero."""
        found = []
        for site, count in extra.items():
            if count:
                found += make_candidates(
                    self.model, "add", sites=[site], new_units=count, seed=self.seed
                )
        return found


class Strategy(GrowthOracle):
    """Base of strategies that widen sites by whole units and need not estimate anything.

    A subclass writes `choose`. The budget, the choice of sites and the bookkeeping are those of
    every growth oracle; the guard is left out, since nothing is promised that it could check.

    Args:
      objective: name of the metric that ranks the trials.
      growth_per_step: a fraction is the most parameters one step may add, relative to those the
        model has; a whole number is the most units.
      batches: batches on which the statistics of new units are measured.
      **kwargs: see `tfgrow.oracle.base.GrowthOracle`.
    """

    guarded = False

    needs_loss: ClassVar[bool] = False
    """Whether the model must be compiled with a loss."""

    endless: ClassVar[bool] = False
    """Whether a step ends only where a limit ends it."""

    def __init__(
        self,
        objective: Any = "val_loss",
        *,
        growth_per_step: int | float | None = 1.0,
        batches: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(objective=objective, growth_per_step=growth_per_step, **kwargs)
        require_whole("batches", batches, optional=False)
        if self.endless and growth_per_step is self.max_params is self.max_flops is None:
            raise ValueError(
                f"Nothing limits what a step of {type(self).__name__} adds. Give growth_per_step, "
                "max_params or max_flops."
            )
        self.batches = batches

    @abc.abstractmethod
    def choose(self, room: Room) -> list[Candidate]:
        """The edits of one step, within `room`; none if nothing fits."""

    def estimated(self, room: Room, chosen: Sequence[Candidate]) -> float | None:
        """The change of the loss by the edits chosen, statistics and all; None if not estimated."""
        del room, chosen
        return None

    def remark(self, chosen: Sequence[Candidate]) -> str:
        """What the plan's reason says, of those chosen or of there being none."""
        return "" if chosen else "no further unit fits the budget"

    def check(self, model: keras.Model, data: Any) -> None:
        """Also checks the loss, and some batches of the data against model and loss."""
        super().check(model, data)
        if self.needs_loss or getattr(model, "loss", None) is not None:
            check_data(GaussNewtonEstimator(model, curvature="none"), data)

    def split(self, dataset) -> GrowthData:
        """Disjoint batches of a dataset for one step: all but a few to measure statistics on."""
        if isinstance(dataset, GrowthData):
            return dataset
        return split_data(dataset, self.batches, 1, 1, seed=self.next_seed())

    def propose_plan(
        self,
        model: keras.Model,
        data: Any,
        *,
        epoch: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Plan:
        """Chooses and measures; see the class. `data` is a dataset or a `GrowthData`."""
        del epoch, progress
        started = time.perf_counter()
        parts = self.split(data)
        room = self._room(model, parts)
        chosen = self.choose(room)
        complete = measured(model, chosen, parts.learn)
        return Plan(
            candidates=tuple(complete),
            estimated_change=self.estimated(room, complete) if complete else None,
            cost=joint_cost(room.costs, chosen),
            widths=new_widths(chosen),
            seconds={"choose": time.perf_counter() - started},
            reason=self.remark(chosen),
        )

    def _room(self, model: keras.Model, parts: GrowthData) -> Room:
        graph = trace(model)
        every = self.open_sites(sites_of(model, graph))
        costs = CostModel(graph, every)
        names = self.site_names([site.names for site in every])
        sites = {site.name: site for site in every if site.name in names}
        multiple = self._limits.round_to or 1
        steps = {name: up_to_multiple(site.units, multiple) for name, site in sites.items()}
        smallest = min((costs.extra({n: more}).params for n, more in steps.items()), default=0)
        limits = self.limits(model.count_params(), costs.base.flops, smallest)
        return Room(model, sites, costs, limits, self.next_seed(), parts)


def scaled_alike(room: Room, most: float = np.inf) -> dict[str, int]:
    """Units to add so that all widths grow by the same factor, as far as they fit.

    One after the other, whichever site is then the least widened; so that small steps, too small
    for every site to have a unit, are used up as well.

    Args:
      room: see `Room`.
      most: largest factor.
    """
    extra = dict.fromkeys(room.sites, 0)
    open_to = list(room.sites)

    def factor(name: str) -> float:
        return room.next_width(name, extra[name]) / room.sites[name].units

    while open_to:
        name = min(open_to, key=factor)
        wanted = room.next_width(name, extra[name]) - room.sites[name].units
        if factor(name) <= most and room.fits({**extra, name: wanted}):
            extra[name] = wanted
        else:
            open_to.remove(name)
    return extra
