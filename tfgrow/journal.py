"""The journal: what grew, when and what it brought, as JSON that other tools read.

A file holds `{"version": 1, "events": [...]}`, one object per `GrowthEvent`, and is replaced as a
whole at every change, so that it can be read at any moment.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrow._files import write_json
from tfgrow.types import GrowthEvent, describe_widths

_VERSION = 1
_PLAIN_COLUMNS = (
    "epoch",
    "status",
    "reason",
    "trial_id",
    "params_before",
    "params_after",
    "flops_before",
    "flops_after",
    "estimated_change",
    "measured_change",
    "loss_before",
    "alpha",
    "newborn_alive",
)


class Journal:
    """An append-only list of growth events, kept in a file if it is given a path.

    Args:
      path: the JSON file to write at every change; None keeps the events in memory. An existing
        file is not read (`Journal.load` does) and is replaced at the first change.
      events: the events to begin with.

    Example:

    >>> from tfgrow.types import GrowthEvent
    >>> journal = Journal()
    >>> journal.append(GrowthEvent(
    ...     epoch=2, applied=({"site": "conv1", "morphism": "add", "units": 2,
    ...     "estimated_change": -0.05},), widths={"conv1": (4, 6)}, params_before=100,
    ...     params_after=140, flops_before=10, flops_after=14, estimated_change=-0.05,
    ...     measured_change=-0.04, loss_before=0.9, alpha=1.0, seconds={"learn": 0.5},
    ...     newborn={"conv1": 2}))
    >>> journal.to_rows()[0]["grew"], journal.widths_history()
    ('conv1 4->6', [{'epoch': 0, 'conv1': 4}, {'epoch': 2, 'conv1': 6}])
    """

    def __init__(
        self, path: str | os.PathLike | None = None, events: Iterable[GrowthEvent] = ()
    ) -> None:
        self.path = None if path is None else os.fspath(path)
        self._events = [_require_event(event) for event in events]

    @classmethod
    def load(cls, path: str | os.PathLike) -> Journal:
        """Reads a journal; it goes on writing to the same file.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not a journal.
        """
        path = os.fspath(path)
        if not tf.io.gfile.exists(path):
            raise FileNotFoundError(f"There is no journal at '{path}'.")
        with tf.io.gfile.GFile(path) as file:
            text = file.read()
        return cls(path, _parse(text, path))

    def append(self, event: GrowthEvent) -> None:
        """Adds an event and writes the file."""
        self._replace([*self._events, _require_event(event)])

    def note_newborn_alive(self, index: int, share: float) -> None:
        """Completes an event with the one figure that is known only an epoch after it.

        Args:
          index: which event; negative counts from the end.
          share: part of the newborn units that are active, 0 to 1.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"newborn_alive is a share from 0 to 1. Found: {share!r}")
        events = list(self._events)
        events[index] = dataclasses.replace(events[index], newborn_alive=float(share))
        self._replace(events)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a copy; an existing file is replaced as a whole."""
        events = [event.to_json() for event in self._events]
        folder = os.path.dirname(os.fspath(path))
        if folder:
            tf.io.gfile.makedirs(folder)
        write_json(path, {"version": _VERSION, "events": _plain(events)}, indent=1)

    def to_rows(self) -> list[dict[str, Any]]:
        """One flat dict per event, all with the same keys, for `pandas.DataFrame` or CSV.

        Columns: the plain fields of `GrowthEvent`, `edits` (how many), `grew` and `morphisms` in
        words, `newborn` (units), `seconds` in all and `seconds/<phase>`, and `width/<site>` after
        the event.
        """
        phases = _in_order(phase for event in self._events for phase in event.seconds)
        history = self.widths_history()[1:]
        rows = zip(self._events, history, strict=True)
        return [_plain(_row(event, widths, phases)) for event, widths in rows]

    def widths_history(self) -> list[dict[str, int]]:
        """Units of every site before the first event and after each one, with its `epoch`.

        Sites that an event does not mention keep their width; rejected events change none.
        """
        widths: dict[str, int] = {}
        for event in self._events:
            for site, (before, _) in event.widths.items():
                widths.setdefault(site, int(before))
        history = [{"epoch": 0, **widths}]
        for event in self._events:
            if event.status == "applied":
                widths |= {site: int(after) for site, (_, after) in event.widths.items()}
            history.append({"epoch": event.epoch, **widths})
        return history

    @property
    def events(self) -> list[GrowthEvent]:
        """The events, oldest first; a copy."""
        return list(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[GrowthEvent]:
        return iter(self._events)

    def __getitem__(self, index: int) -> GrowthEvent:
        return self._events[index]

    def _replace(self, events: list[GrowthEvent]) -> None:
        # The file first: if writing fails, the journal in memory still agrees with it.
        if self.path is not None:
            Journal(None, events).save(self.path)
        self._events = events


def _row(event: GrowthEvent, widths: Mapping[str, int], phases: list[str]) -> dict[str, Any]:
    row = {name: getattr(event, name) for name in _PLAIN_COLUMNS}
    row["edits"] = len(event.applied)
    row["morphisms"] = ", ".join(_in_order(edit["morphism"] for edit in event.applied))
    row["grew"] = describe_widths(event.widths) if event.status == "applied" else ""
    row["newborn"] = sum(event.newborn.values())
    row["seconds"] = float(sum(event.seconds.values()))
    row |= {f"seconds/{phase}": event.seconds.get(phase) for phase in phases}
    row |= {f"width/{site}": units for site, units in widths.items() if site != "epoch"}
    return row


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _plain(value: Any) -> Any:
    """The value in strict JSON types: NumPy scalars unwrapped, what is not finite as None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parse(text: str, path: str) -> list[GrowthEvent]:
    try:
        data = json.loads(text)
        version, events = data["version"], data["events"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is not a growth journal: {error!r}.") from error
    if version != _VERSION:
        raise ValueError(
            f"'{path}' is a journal of version {version!r}; this tfgrow reads {_VERSION}. "
            "Read it with the tfgrow that wrote it."
        )
    try:
        return [GrowthEvent.from_json(event) for event in events]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' holds an event that cannot be read: {error!r}.") from error


def _require_event(event: Any) -> GrowthEvent:
    if not isinstance(event, GrowthEvent):
        raise TypeError(f"A journal takes GrowthEvents. Found: {type(event).__name__}.")
    return event
