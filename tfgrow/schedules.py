"""When to grow: a schedule is asked once per finished epoch."""

from __future__ import annotations

import abc
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras

_LARGER_IS_BETTER = ("acc", "accuracy", "auc", "precision", "recall", "f1_score", "iou", "io_u")
_SMALLER_IS_BETTER = ("loss", "error", "mse", "mae", "mape", "msle", "rmse", "crossentropy")


class Schedule(abc.ABC):
    """Interface: decides after each epoch whether the model should grow now.

    Subclasses write `should_grow`, and `get_config` if their constructor takes arguments. One that
    remembers past epochs also writes `reset`.
    """

    @property
    def earliest(self) -> int:
        """The first epoch, counted from 1, after which the model may grow."""
        return 1

    @abc.abstractmethod
    def should_grow(self, epoch: int, logs: Mapping[str, Any] | None = None) -> bool:
        """Whether to grow now; called once per finished epoch, in order.

        Args:
          epoch: epochs completed, 1 after the first one.
          logs: figures of that epoch by name.
        """

    def reset(self) -> None:  # noqa: B027 - most schedules remember nothing
        """Forgets what it saw; called when a training run starts."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as plain JSON types."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """The inverse of `get_config`."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="tfgrow")
class EveryNEpochs(Schedule):
    """Grows after every `n`-th epoch.

    Args:
      n: epochs from one growth to the next.
      start: the first epoch to grow after (epochs count from 1); `n` by default.
      stop: the last epoch to grow after; None is never stopping.

    Example:

    >>> schedule = EveryNEpochs(2, start=1, stop=5)
    >>> [epoch for epoch in range(1, 10) if schedule.should_grow(epoch)]
    [1, 3, 5]
    """

    def __init__(self, n: int, start: int | None = None, stop: int | None = None) -> None:
        self.n = _whole("n", n, least=1)
        self.start = self.n if start is None else _whole("start", start, least=0)
        self.stop = None if stop is None else _whole("stop", stop, least=0)
        if self.stop is not None and self.stop < self.start:
            raise ValueError(
                f"EveryNEpochs would never grow: stop={self.stop} comes before start={self.start}."
            )

    @property
    def earliest(self) -> int:
        return self.start

    def should_grow(self, epoch: int, logs: Mapping[str, Any] | None = None) -> bool:
        late = self.stop is not None and epoch > self.stop
        return epoch >= self.start and not late and (epoch - self.start) % self.n == 0

    def get_config(self) -> dict[str, Any]:
        return {"n": self.n, "start": self.start, "stop": self.stop}


@keras.saving.register_keras_serializable(package="tfgrow")
class OnPlateau(Schedule):
    """Grows when a metric has stopped improving.

    After a growth it waits `cooldown` epochs and then counts anew; the best value so far stays
    the one to beat, so a grown model that does not improve on it grows again.

    Args:
      monitor: name of a figure in the epoch's logs.
      patience: epochs without improvement before it grows.
      min_delta: smallest change that counts as improvement, in the metric's unit.
      mode: `"min"`, `"max"`, or `"auto"` to tell by the name.
      cooldown: epochs after a growth that do not count.

    Raises:
      ValueError: an argument out of range, or a name that does not tell the mode.

    Example:

    >>> schedule = OnPlateau("val_loss", patience=2)
    >>> losses = [0.9, 0.5, 0.5, 0.5, 0.4]
    >>> [schedule.should_grow(e, {"val_loss": v}) for e, v in enumerate(losses, start=1)]
    [False, False, False, True, False]
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 2,
        min_delta: float = 1e-4,
        mode: str = "auto",
        cooldown: int = 0,
    ) -> None:
        if not isinstance(monitor, str):
            raise TypeError(f"monitor is the name of a metric. Found: {monitor!r}")
        if not (isinstance(min_delta, (int, float)) and 0 <= min_delta < math.inf):
            raise ValueError(f"min_delta must be a finite number >= 0. Found: {min_delta!r}")
        self.monitor = monitor
        self.patience = _whole("patience", patience, least=1)
        self.min_delta = float(min_delta)
        self.mode = mode
        self.cooldown = _whole("cooldown", cooldown, least=0)
        self._sign = -1.0 if _resolve_mode(mode, monitor) == "max" else 1.0
        self.reset()

    def reset(self) -> None:
        self._best = math.inf
        self._waited = 0
        self._cooling = 0
        self._warned = False

    def should_grow(self, epoch: int, logs: Mapping[str, Any] | None = None) -> bool:
        """Whether the metric has stopped improving.

        Raises:
          ValueError: the logs lack the metric.
        """
        if self.monitor not in (logs or {}) and self.monitor.startswith("val_"):
            self._warn_unvalidated(epoch)
            return False
        value = self._sign * float(self._monitored(epoch, logs))
        if math.isnan(value):
            return False  # a diverged epoch says nothing about missing capacity
        improved = value < self._best - self.min_delta
        self._best = value if improved else self._best
        if self._cooling:
            self._cooling -= 1
            return False
        self._waited = 0 if improved else self._waited + 1
        if self._waited < self.patience:
            return False
        self._waited, self._cooling = 0, self.cooldown
        return True

    def get_config(self) -> dict[str, Any]:
        return {
            "monitor": self.monitor,
            "patience": self.patience,
            "min_delta": self.min_delta,
            "mode": self.mode,
            "cooldown": self.cooldown,
        }

    def _warn_unvalidated(self, epoch: int) -> None:
        """Epochs without validation are passed over, as Keras's own callbacks do."""
        if not self._warned:
            warnings.warn(
                f"OnPlateau monitors '{self.monitor}', which epoch {epoch} did not report, and "
                "passes over such epochs. Give fit validation data if it never comes.",
                stacklevel=3,
            )
        self._warned = True

    def _monitored(self, epoch: int, logs: Mapping[str, Any] | None) -> Any:
        if logs and self.monitor in logs:
            return logs[self.monitor]
        raise ValueError(
            f"OnPlateau monitors '{self.monitor}', which epoch {epoch} did not report. "
            f"Found: {sorted(logs or {})}. Please monitor one of these."
        )


_NAMED: dict[str, Callable[[], Schedule]] = {
    "every_epoch": lambda: EveryNEpochs(1),
    "on_plateau": OnPlateau,
}


def get(identifier: Schedule | int | str | Mapping[str, Any]) -> Schedule:
    """A schedule from its short form.

    Args:
      identifier: a schedule; a whole number `n` for `EveryNEpochs(n)`; `"every_epoch"`,
        `"every_3_epochs"` or `"on_plateau"`; or a config from `keras.saving`.

    Raises:
      TypeError, ValueError: anything else, naming what is understood.

    Example:

    >>> get(3).get_config(), type(get("on_plateau")).__name__
    ({'n': 3, 'start': 3, 'stop': None}, 'OnPlateau')
    """
    if isinstance(identifier, Schedule):
        return identifier
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        return EveryNEpochs(identifier)
    if isinstance(identifier, str):
        return _from_name(identifier)
    if isinstance(identifier, Mapping):
        found = keras.saving.deserialize_keras_object(dict(identifier))
        if isinstance(found, Schedule):
            return found
    raise TypeError(
        "A schedule is a tfgrow.schedules.Schedule, a number of epochs, a name such as "
        f"'every_3_epochs' or 'on_plateau', or a serialized schedule. Found: {identifier!r}"
    )


def _from_name(name: str) -> Schedule:
    if name in _NAMED:
        return _NAMED[name]()
    match = re.fullmatch(r"every_(\d+)_epochs?", name)
    if match:
        return EveryNEpochs(int(match[1]))
    raise ValueError(
        f"Unknown schedule '{name}'. Expected one of {sorted(_NAMED)} or 'every_<n>_epochs'."
    )


def _resolve_mode(mode: str, monitor: str) -> str:
    if mode in ("min", "max"):
        return mode
    if mode != "auto":
        raise ValueError(f"mode must be 'min', 'max' or 'auto'. Found: {mode!r}")
    for names, resolved in ((_SMALLER_IS_BETTER, "min"), (_LARGER_IS_BETTER, "max")):
        if any(re.search(rf"(^|_){name}(_\d+)?$", monitor) for name in names):
            return resolved
    raise ValueError(
        f"The name '{monitor}' does not tell whether smaller or larger is better. "
        "Pass mode='min' or mode='max'."
    )


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}. Found: {value!r}")
    return value
