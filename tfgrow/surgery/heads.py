"""Edits of attention heads as new values of variables: pure, nothing is touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfgrow.layers.attention import Attention
from tfgrow.surgery.weights import MOST_DEPENDENT, merge_edits, precise, source_of, units_of
from tfgrow.types import (
    NEWBORN,
    AxisSource,
    HeadsEdit,
    LayerChange,
    NewHeads,
    VariableChange,
)


def heads_changes(edits: Sequence[HeadsEdit]) -> list[LayerChange]:
    """What a set of edits does to the attention layers."""
    return [_change(edit) for edit in merge_edits(edits)]


def _change(edit: HeadsEdit) -> LayerChange:
    layer = edit.site.producer
    changes = {
        f"{layer.sublayers[name]}.{variable}": _incoming(edit, layer, name, variable)
        for name, sublayer in layer.projections().items()
        for variable in ("kernel", "bias")
        if getattr(sublayer, variable) is not None
    }
    changes |= _outgoing(edit, layer)
    return LayerChange(
        layer,
        layer.unit_attributes(edit.new_width),
        changes,
        layer.unit_build_shapes(edit.new_width),
    )


def _incoming(edit: HeadsEdit, layer: Attention, name: str, variable: str) -> VariableChange:
    path = f"{layer.sublayers[name]}.{variable}"
    parameter = name if variable == "kernel" else f"{name}_bias"
    axis, old = _heads_first(layer, path)
    by_unit = old.reshape(edit.site.units, -1, *old.shape[1:])
    units = units_of(edit)
    new = [
        by_unit[u]
        if isinstance(u, int)
        else layer.as_heads(path, np.asarray(u.weights[parameter], old.dtype))
        for u in units
    ]
    scale = np.array([u.gradient_scale if isinstance(u, NewHeads) else 1.0 for u in units])
    heads = by_unit.shape[1]
    parents = _by_head(units, heads)
    source = AxisSource(axis, parents, np.ones(len(parents)), scale.repeat(heads))
    return VariableChange(np.moveaxis(np.concatenate(new), 0, axis), (source,))


def _outgoing(edit: HeadsEdit, layer: Attention) -> dict[str, VariableChange]:
    """The changes of the output projection; of its bias, where something is removed."""
    path = f"{layer.output_sublayer}.kernel"
    _, old = _heads_first(layer, path)
    heads = len(old) // edit.site.units
    fold, constant = _fold(edit, len(old) * old.shape[1])
    rows = old.reshape(len(constant), -1)
    folded = rows if fold is None else fold @ rows
    by_unit = folded.reshape(edit.site.units, heads, *old.shape[1:])
    units, new, share = units_of(edit), [], []
    for unit in units:
        if isinstance(unit, int):
            new.append(by_unit[unit])
            share.append(1.0)
        elif unit.source == NEWBORN:
            new.append(layer.as_heads(path, np.asarray(unit.projection, old.dtype)))
            share.append(1.0)
        else:
            new.append(by_unit[unit.source] * unit.projection)
            share.append(unit.projection)
    shares = np.repeat(np.asarray(share, np.float64), heads)
    source = AxisSource(
        0,
        _by_head(units, heads),
        shares,
        np.ones(len(shares)),
        newborn_zero=True,
        fold=fold,
        fold_axes=2,
    )
    changes = {path: VariableChange(np.concatenate(new).astype(old.dtype), (source,))}
    if constant.any():
        bias = precise(np.asarray(layer.output_projection.bias))
        made = (constant @ rows).reshape(bias.shape)
        changes[f"{layer.output_sublayer}.bias"] = VariableChange(
            bias + made.astype(bias.dtype), shift=made
        )
    return changes


def _heads_first(layer: Attention, path: str) -> tuple[int, np.ndarray]:
    """The axis of a variable that the heads lie on, and its values with that axis first."""
    axis = layer.head_axis(path)
    assert axis is not None
    return axis, np.moveaxis(precise(np.asarray(layer.growable_variables()[path])), axis, 0)


def _by_head(units, heads: int) -> np.ndarray:
    """The old head that each head descends from, or `NEWBORN`."""
    source = source_of(units)[:, None]
    return np.where(source == NEWBORN, NEWBORN, source * heads + np.arange(heads)).reshape(-1)


def _fold(edit: HeadsEdit, size: int) -> tuple[np.ndarray | None, np.ndarray]:
    """How the rows `[size]` of removed units are taken over by others', and what is constant.

    Units that are removed together may be named as standing in for each other: what they stand for
    is passed on to those that stay.
    """
    constant = np.zeros(size)
    if not edit.removed:
        return None, constant
    depth = size // edit.site.units
    gone = sorted(edit.removed)
    rows = np.concatenate([np.arange(unit * depth, (unit + 1) * depth) for unit in gone])
    shares = np.concatenate([np.asarray(edit.removed[u].shares, np.float64) for u in gone], axis=1)
    offsets = np.concatenate([np.asarray(edit.removed[u].offset, np.float64) for u in gone])
    for number, unit in enumerate(gone):
        mine = slice(unit * depth, (unit + 1) * depth)
        shares[mine, number * depth : (number + 1) * depth] = 0.0
    among = np.eye(len(rows)) - shares[rows]  # contexts = rest + contexts @ shares among them
    if np.linalg.cond(among) > MOST_DEPENDENT:
        raise ValueError(
            f"Heads {gone} of layer '{edit.site.name}' stand in for each other and can't all be "
            "removed at once; remove some, and learn anew what stands in for the others."
        )
    passed_on = np.linalg.inv(among)
    shares[rows] = 0.0
    fold = np.eye(size)
    fold[:, rows] += shares @ passed_on
    constant[rows] = offsets @ passed_on
    return fold, constant
