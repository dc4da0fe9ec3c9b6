"""What strategies share that rank edits of single units by what the data say of them."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfgrow.morphisms.base import Candidate
from tfgrow.oracle.data import GrowthData, split_data
from tfgrow.strategies.base import Room, Strategy


class Ranked(Strategy):
    """Base of strategies that take the best of all edits, one after the other, as far as they fit.

    A subclass writes `ranked`.

    Args:
      batches: batches that the edits are found on.
      **kwargs: see `tfgrow.strategies.Strategy`.
    """

    needs_loss = True

    def __init__(self, objective: Any = "val_loss", *, batches: int = 16, **kwargs: Any) -> None:
        super().__init__(objective, batches=batches, **kwargs)

    @abc.abstractmethod
    def ranked(
        self, room: Room, sites: Sequence[str]
    ) -> tuple[Sequence[Candidate], Sequence[float]]:
        """Edits that bring a unit each, and by how much each promises to change the loss."""

    def choose(self, room: Room) -> list[Candidate]:
        sites = [name for name, site in room.sites.items() if room.fits({name: _next(room, name)})]
        return best_first(room, *self.ranked(room, sites)) if sites else []

    def split(self, dataset) -> GrowthData:
        """Disjoint batches of a dataset for one step: a fourth as many to estimate on."""
        if isinstance(dataset, GrowthData):
            return dataset
        score = max(1, self.batches // 4)
        return split_data(dataset, self.batches, score, 1, seed=self.next_seed())

    def remark(self, chosen: Sequence[Candidate]) -> str:
        return "" if chosen else "no unit that lowers the loss fits the budget"


def best_first(
    room: Room, candidates: Sequence[Candidate], changes: Sequence[float]
) -> list[Candidate]:
    """The candidates that lower the loss most, in this order, as far as they fit.

    With `round_to` those that bring a site to its next allowed width go together, and count as much
    as they do on average.

    Args:
      room: see `Room`.
      candidates: each brings a unit.
      changes: of the loss, by candidate; only those under zero are chosen.
    """
    waiting: dict[str, list[int]] = {}
    for row in np.argsort(changes, kind="stable"):
        if changes[row] < 0:
            waiting.setdefault(candidates[row].site.name, []).append(int(row))
    extra = dict.fromkeys(waiting, 0)
    chosen: list[int] = []

    def bundle(name: str) -> list[int]:
        return waiting[name][: _next(room, name, extra[name])]

    while waiting:
        name = min(waiting, key=lambda name: np.mean(np.take(changes, bundle(name))))
        rows, wanted = bundle(name), _next(room, name, extra[name])
        if len(rows) < wanted or not room.fits({**extra, name: extra[name] + wanted}):
            del waiting[name]
            continue
        chosen += rows
        extra[name] += wanted
        waiting[name] = waiting[name][wanted:]
        if not waiting[name]:
            del waiting[name]
    return [candidates[row] for row in chosen]


def _next(room: Room, name: str, extra: int = 0) -> int:
    """How many more units bring a site to its next allowed width."""
    return room.next_width(name, extra) - room.sites[name].units - extra
