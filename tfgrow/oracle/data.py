"""The data of one growth step: parts that have no sample in common.

Theta overfits the batches it is learned on, so candidates are scored on others, and the chosen set
is judged on yet others (method: cross-fitting).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from typing import Any

import tensorflow as tf

from tfgrow.capture.batches import BATCH_SIZE, Batch, batches_of, map_arrays, size_of_batch
from tfgrow.estimator import GaussNewtonEstimator

SEEN = 64
"""About so many samples are enough to see which units are alive."""


@dataclasses.dataclass(frozen=True, eq=False)
class GrowthData:
    """Disjoint lists of batches to learn theta on, to score with, and to judge the result by."""

    learn: list[Batch]
    score: list[Batch]
    held_out: list[Batch]

    @property
    def few_held_out(self) -> list[Batch]:
        """Enough of them to see which units are alive: two batches, and some samples."""
        first = _samples(self.held_out[:1]) or SEEN
        return self.held_out[: max(2, math.ceil(SEEN / first))]


def split_data(
    dataset, learn: int, score: int, held_out: int, seed: int | None = None
) -> GrowthData:
    """Takes batches from one pass over a dataset and shares them out.

    Args:
      dataset: anything `model.fit` takes, with targets; it may be endless.
      learn: batches wanted to learn on. A shorter dataset is shared out in the same proportions.
      score: batches wanted to score with.
      held_out: batches wanted to judge by.
      seed: shuffles arrays; a `tf.data.Dataset` keeps its own order.
    """
    wanted = (learn, score, held_out)
    batches = list(islice(batches_of(dataset, BATCH_SIZE, seed), sum(wanted)))
    if len(batches) < sum(wanted):
        batches = _finer(batches, sum(wanted))
    check_size(len(batches))
    last = min(_share(len(batches), held_out, wanted), len(batches) - 2)
    first = min(_share(len(batches), learn, wanted), len(batches) - last - 1)
    return GrowthData(batches[:first], batches[first:-last], batches[-last:])


def _share(batches: int, part: int, wanted: tuple[int, ...]) -> int:
    """How many of the batches a part gets, of those that were wanted for all."""
    return max(1, math.floor(batches * part / sum(wanted)))


def check_data(estimator: GaussNewtonEstimator, data: Any) -> None:
    """Raises ValueError or TypeError for data that fit neither model nor loss, or are too few."""
    some = data.learn[:1] if isinstance(data, GrowthData) else list(islice(batches_of(data), 3))
    estimator.loss(some[:1])
    if not isinstance(data, GrowthData):
        check_size(_samples(some))


def check_size(samples: int) -> None:
    """Raises ValueError for fewer samples than a growth step has parts."""
    if samples < 3:
        raise ValueError(
            f"The dataset has {samples} samples; a growth step needs at least 3, and many more to "
            "tell good edits from bad ones."
        )


def _finer(batches: list[Batch], pieces: int) -> list[Batch]:
    """The same samples in about `pieces` batches of equal size, or more of less equal ones.

    Samples of different shapes, sequences as long as the longest of their batch, stay apart.
    """
    size = max(1, _samples(batches) // pieces)
    if len({_shapes(batch) for batch in batches}) == 1:
        batches = [_joined(batches)]
    return [piece for batch in batches for piece in _pieces(batch, size)]


def larger_batches(batches: Iterable[Batch], least: int = BATCH_SIZE) -> list[Batch]:
    """The same samples in batches of at least so many each, where they can be put together.

    Where there are fewer in all, they are one batch. Samples of different shapes stay apart.
    """
    found: list[list[Batch]] = []
    for _, alike in groupby(batches, key=_shapes):
        start = len(found)
        for batch in alike:
            if len(found) == start or _samples(found[-1]) >= least:
                found.append([])
            found[-1].append(batch)
        if len(found) > start + 1 and _samples(found[-1]) < least:
            found[-2:] = [[*found[-2], *found[-1]]]
    return [_joined(some) if len(some) > 1 else some[0] for some in found]


def _samples(batches: Iterable[Batch]) -> int:
    return sum(size_of_batch(batch) for batch in batches)


def _joined(batches: Sequence[Batch]) -> Batch:
    return map_arrays(lambda *parts: tf.concat(parts, axis=0), *batches)


def _shapes(batch: Batch) -> tuple:
    """The shapes of its samples."""
    return tuple(tuple(part.shape[1:]) for part in tf.nest.flatten(batch) if part is not None)


def _pieces(batch: Batch, size: int) -> list[Batch]:
    """A batch cut into batches of one size; what is too small for one is left out."""
    samples = size_of_batch(batch)
    size = min(size, samples)
    return [
        map_arrays(lambda part: part[start : start + size], batch)  # noqa: B023
        for start in range(0, samples - size + 1, size)
    ]
