"""Edits, applied to a live model: all of them or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import keras

from tfgrow.graph import versions
from tfgrow.surgery import transaction
from tfgrow.surgery.heads import heads_changes
from tfgrow.surgery.weights import layer_changes
from tfgrow.types import HeadsEdit, KernelEdit, LayerChange, WidthEdit


def apply_edits(
    model: keras.Model, edits: Sequence[WidthEdit | KernelEdit | HeadsEdit]
) -> list[LayerChange]:
    """Edits the model object in place; optimizer slots follow channel by channel.

    Args:
      model: a built growable model, compiled or not, inside or outside `fit`.
      edits: of its sites.

    Returns:
      What was changed, by layer.

    Raises:
      ValueError: if an edit doesn't fit; the model and its optimizer are then as before.
    """
    heads = [edit for edit in edits if isinstance(edit, HeadsEdit)]
    others = [edit for edit in edits if not isinstance(edit, HeadsEdit)]
    changes = [*layer_changes(others), *heads_changes(heads)]
    with growth_transaction(model):
        transaction.edit(model, changes)
        versions.advance(model)
    return changes


class GrowthTransaction:
    """A transaction that also puts the model's version back."""

    def __init__(self, model: keras.Model, inner: transaction.Transaction):
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
        with transaction.transaction(model) as inner:
            yield GrowthTransaction(model, inner)
    except BaseException:
        versions.restore(model, version)
        raise
