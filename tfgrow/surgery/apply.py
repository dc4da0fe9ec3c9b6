"""Edits, applied to a live model: all of them or none."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from tfgrow.graph import versions
from tfgrow.surgery import transaction
from tfgrow.surgery.heads import heads_changes
from tfgrow.surgery.insert import add_branch, free_name
from tfgrow.surgery.transaction import growth_transaction
from tfgrow.surgery.weights import layer_changes
from tfgrow.types import BranchEdit, HeadsEdit, KernelEdit, LayerChange, WidthEdit

Edit = WidthEdit | KernelEdit | BranchEdit | HeadsEdit


def apply_edits(model: keras.Model, edits: Sequence[Edit]) -> list[LayerChange]:
    """Edits the model object in place; optimizer slots follow channel by channel.

    Args:
      model: a built growable model, compiled or not, inside or outside `fit`.
      edits: of its sites.

    Returns:
      What was changed, by layer; the layers that are new among them.

    Raises:
      ValueError: if an edit doesn't fit; the model and its optimizer are then as before.
    """
    heads = [edit for edit in edits if isinstance(edit, HeadsEdit)]
    branches = [edit for edit in edits if isinstance(edit, BranchEdit)]
    others = [edit for edit in edits if not isinstance(edit, (HeadsEdit, BranchEdit))]
    changes = [*layer_changes(others), *heads_changes(heads)]
    with growth_transaction(model):
        if changes:
            transaction.edit(model, changes)
        for branch in branches:
            changes += _insert(model, branch)
        versions.advance(model)
    return changes


def _insert(model: keras.Model, branch: BranchEdit) -> list[LayerChange]:
    made = []

    def build(tensor):
        for new in branch.layers:
            config = {**new.config, "name": free_name(model, new.config["name"])}
            layer = new.layer_class.from_config(config)
            tensor = layer(tensor)
            layer.set_weights(new.weights)
            made.append(LayerChange(layer, {}, {}, inserted=new.at_rest))
        return tensor

    add_branch(model, branch.source, branch.target, build)
    return made
