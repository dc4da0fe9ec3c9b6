"""All or nothing: an edit of a model either ends well or leaves no trace.

A snapshot holds references (attributes, the contents of lists, dicts and sets) and, of every
variable, a tensor that shares the variable's memory: TensorFlow copies a buffer only when it writes
to a variable while somebody else holds the old value. So taking a snapshot copies no weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from tfgrow.graph import versions
from tfgrow.surgery import optimizer, rebuild
from tfgrow.types import LayerChange


class Transaction:
    """The state of a model and of its training at one moment, to which `rollback` returns.

    State means what `model.fit`, `save` and `summary` see: layers, variables and their values,
    symbolic graph, configs, metrics, seeds, optimizer with slots and counters, compiled functions.
    """

    def __init__(self, model: keras.Model):
        self._attributes: list[tuple[Any, dict]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._values: list[tuple[Any, Any]] = []
        self._open = True
        self._record(model)

    def rollback(self) -> None:
        """Puts everything back as it was when the transaction began; may be called many times.

        Raises:
          RuntimeError: the transaction is over.
        """
        if not self._open:
            raise RuntimeError("This transaction is over. Roll back inside its `with` block.")
        try:
            self._restore()
        except KeyboardInterrupt:
            # Restoring is idempotent: finish it before letting the interrupt through.
            self._restore()
            raise

    def close(self) -> None:
        """Forgets the snapshot, and with it the last references to what the edit replaced."""
        self._open = False
        for records in (self._attributes, self._contents, self._values):
            records.clear()

    def _record(self, model: keras.Model) -> None:
        seen: set[int] = set()
        stack: list[Any] = [model]
        while stack:
            item = stack.pop()
            kind = _kind(item.__class__)  # not type(): that of a proxy is not what it stands for
            if kind is None or id(item) in seen:
                continue
            seen.add(id(item))
            if kind is tuple:
                stack.extend(item)
            elif kind is object:
                self._attributes.append((item, dict(vars(item))))
                if isinstance(item, keras.Variable):
                    self._values.append((item.value, item.value.read_value()))
                stack.extend(vars(item).values())
            else:
                self._contents.append((item, _contents(item)))
                stack.extend(item.values() if kind is dict else item)
                if rebuild.is_wrapped_list(item):
                    self._attributes.append((item, dict(vars(item))))
                    stack.extend(vars(item).values())

    def _restore(self) -> None:
        for item, attributes in self._attributes:
            if not _same(vars(item), attributes):
                vars(item).clear()
                vars(item).update(attributes)
        for container, contents in self._contents:
            if not _same(container, contents):
                _refill(container, contents)
        for variable, value in self._values:
            variable.assign(value)


@contextlib.contextmanager
def transaction(model: keras.Model) -> Iterator[Transaction]:
    """Restores model and optimizer bit-identically if the block raises anything at all.

    Args:
      model: a built Keras model, compiled or not.

    Yields:
      The `Transaction`, whose `rollback()` rejects an edit without an error. Transactions nest.

    Example:

    >>> import keras
    >>> from tfgrow.surgery.transaction import transaction
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> with transaction(model) as edit:
    ...     model.layers[0].bias.assign([5.0]).numpy()
    ...     edit.rollback()
    array([5.], dtype=float32)
    >>> model.layers[0].bias.numpy()
    array([0.], dtype=float32)
    """
    snapshot = Transaction(model)
    try:
        yield snapshot
    except BaseException:
        snapshot.rollback()
        raise
    finally:
        snapshot.close()


class GrowthTransaction:
    """A transaction that also puts the model's version back."""

    def __init__(self, model: keras.Model, inner: Transaction):
        self._model = model
        self._inner = inner
        self._version = versions.version_of(model)

    def rollback(self) -> None:
        """Puts model, optimizer and version back as they were when the transaction began."""
        self._inner.rollback()
        versions.restore(self._model, self._version)


@contextlib.contextmanager
def growth_transaction(model: keras.Model) -> Iterator[GrowthTransaction]:
    """Restores the model, its optimizer and its version if the block raises anything at all."""
    version = versions.version_of(model)
    try:
        with transaction(model) as inner:
            yield GrowthTransaction(model, inner)
    except BaseException:
        versions.restore(model, version)
        raise


def edit(model: keras.Model, changes: Sequence[LayerChange]) -> None:
    """Applies changes to layers and optimizer slots: all of them, or none if anything goes wrong.

    Works outside `fit` and in its callbacks, and never calls `compile`.

    Args:
      model: a built Functional or Sequential model, compiled or not.
      changes: see `tfgrow.surgery.rebuild.apply_changes`.

    Raises:
      TypeError: the model is neither Functional nor Sequential.
      ValueError: a change does not fit, or the optimizer's slots are unknown (see
        `tfgrow.surgery.optimizer.register_slots`).
    """
    optimizer.check_optimizer(model)
    with transaction(model):
        optimizer.grow_optimizer(model, rebuild.apply_changes(model, changes))


@functools.cache
def _kind(cls: type) -> type | None:
    """What a snapshot makes of a class: `object` is one with state; None is left alone.

    Asked of all that a model holds, hundreds of thousands of objects of a few dozen classes.
    """
    if issubclass(cls, rebuild.STATEFUL):
        return object
    return next((kind for kind in (dict, list, set, tuple) if issubclass(cls, kind)), None)


def _contents(container: Any) -> Any:
    """A plain copy: of the items of a dict, or of the elements of a list or set."""
    return dict(container) if isinstance(container, dict) else list(container)


def _same(container: Any, contents: Any) -> bool:
    """Whether a container still holds the very same objects, in the same order."""
    if isinstance(contents, dict):
        return list(container) == list(contents) and all(
            container[key] is value for key, value in contents.items()
        )
    return len(container) == len(contents) and all(
        found is kept for found, kept in zip(container, contents, strict=True)
    )


def _refill(container: Any, contents: Any) -> None:
    """Puts contents back, past the overrides by which containers report to their trackers."""
    if isinstance(contents, dict):
        rebuild.refill_dict(container, contents)
    elif isinstance(container, list):
        list.clear(container)
        list.extend(container, contents)
    else:
        set.clear(container)
        set.update(container, contents)
