"""Width edits as new values of variables: pure, nothing is touched.

Edits of neighbouring sites meet in one kernel, as producer of the one and consumer of the other.
The output side is built first, in the old input channels; the input side then widens all of it, so
that a split's deviation theta is inherited by the halves of a split input channel as weights are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfgrow.graph.sites import Leaf, Step, channel_maps
from tfgrow.types import NEWBORN, AxisSource, LayerChange, NewUnit, VariableChange, WidthEdit

MOST_DEPENDENT = 100.0
"""Condition number above which units that stand in for each other can't all be removed."""


def merge_edits(edits: Sequence[WidthEdit]) -> list[WidthEdit]:
    """One edit per site.

    Raises:
      ValueError: if two edits change the same unit.
    """
    merged: dict[str, WidthEdit] = {}
    for edit in edits:
        known = merged.get(edit.site.name)
        if known is None:
            merged[edit.site.name] = edit
            continue
        twice = sorted(_edited(known) & _edited(edit))
        if twice:
            raise ValueError(
                f"Unit {twice[0]} of site '{edit.site.name}' is edited twice at once; choose one "
                "of its candidates."
            )
        merged[edit.site.name] = WidthEdit(
            edit.site,
            {**known.replaced, **edit.replaced},
            (*known.appended, *edit.appended),
            {**known.removed, **edit.removed},
        )
    for edit in merged.values():
        if len(edit.removed) >= edit.site.units:
            raise ValueError(
                f"All {edit.site.units} units of site '{edit.site.name}' would be removed; leave "
                "one or more."
            )
    return list(merged.values())


def _edited(edit: WidthEdit) -> set[int]:
    return set(edit.replaced) | set(edit.removed)


def layer_changes(edits: Sequence[WidthEdit]) -> list[LayerChange]:
    """What a set of width edits does to every layer it reaches."""
    work: dict[int, _LayerWork] = {}
    merged = merge_edits(edits)
    for edit in merged:
        producer = _work(work, edit.site.producer)
        producer.attributes.update(edit.site.producer.width_attributes(edit.new_width))
        producer.widen_outputs(edit)
        for number, step in enumerate(edit.site.steps):
            if getattr(step.layer, "variable_axes", None):
                _work(work, step.layer).widen_channels(edit, number, step)
            arriving = channel_maps(edit.site, edit.new_width)[step.source].size
            if attributes := step.view.resized_attributes(arriving):
                _work(work, step.layer).attributes.update(attributes)
    for edit in merged:
        reads = [(leaf, node) for leaf in edit.site.leaves for node in leaf.consumers]
        for consumer, (leaf, node) in enumerate(reads):
            _work(work, node.operation).widen_inputs(edit, leaf, consumer)
    return [item.change() for item in work.values()]


def _work(work: dict, layer) -> _LayerWork:
    return work.setdefault(id(layer), _LayerWork(layer))


def _units(edit: WidthEdit) -> list[NewUnit | int]:
    """Per new unit: what it is, or the index of the old unit that stays as it is."""
    kept = [unit for unit in range(edit.site.units) if unit not in edit.removed]
    return [*(edit.replaced.get(unit, unit) for unit in kept), *edit.appended]


def _stand_ins(edit: WidthEdit) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Removed units, how the others stand in for them `[removed, units]`, and what is constant.

    Units that are removed together may be named as standing in for each other: what they stand
    for is passed on to those that stay.
    """
    gone = sorted(edit.removed)
    shares: np.ndarray = np.array([edit.removed[unit].shares for unit in gone], dtype=np.float64)
    offsets: np.ndarray = np.array([edit.removed[unit].offset for unit in gone], dtype=np.float64)
    shares[range(len(gone)), gone] = 0.0
    among = np.eye(len(gone)) - shares[:, gone]
    if np.linalg.cond(among) > MOST_DEPENDENT:
        raise ValueError(
            f"Units {gone} of site '{edit.site.name}' stand in for each other and can't all be "
            "removed at once; remove some, and learn anew what stands in for the others."
        )
    shares = np.linalg.solve(among, shares)
    shares[:, gone] = 0.0
    return gone, shares, np.linalg.solve(among, offsets)


def _fold(edit: WidthEdit, leaf: Leaf) -> tuple[np.ndarray, np.ndarray]:
    """How the consumers' rows `[size]` of removed units are taken over by others.

    Returns:
      `[size, size]`, by which the rows are multiplied, and `[size]`, the constant that stands in
      for an input: what the rows make of it goes to the bias.
    """
    gone, shares, offsets = _stand_ins(edit)
    fold, constant = np.eye(leaf.channels.size), np.zeros(leaf.channels.size)
    for unit, share, offset in zip(gone, shares, offsets, strict=True):
        mine = leaf.channels.index[unit]
        constant[mine] = offset
        for other in np.flatnonzero(share):
            fold[leaf.channels.index[other], mine] += share[other]
    return fold, constant


class _LayerWork:
    """A layer's variables on their way to their new values."""

    def __init__(self, layer):
        self.layer = layer
        self.attributes: dict[str, Any] = {}
        self.values = {
            name: _precise(np.asarray(variable))
            for name, variable in getattr(layer, "growable_variables", dict)().items()
        }
        self.sources: dict[str, list[AxisSource]] = {name: [] for name in self.values}
        self.moved: set[str] = set()  # variables that change without being resized

    def change(self) -> LayerChange:
        return LayerChange(
            self.layer,
            self.attributes,
            {
                name: VariableChange(value, tuple(self.sources[name]))
                for name, value in self.values.items()
                if self.sources[name] or name in self.moved
            },
        )

    def widen_outputs(self, edit: WidthEdit) -> None:
        units = _units(edit)
        source = _source(units)
        for name in self.values:
            axis = self.layer.variable_axes[name].fan_out
            if axis is None:
                continue
            old = np.moveaxis(self.values[name], axis, 0)
            new = [old[u] if isinstance(u, int) else u.fan_in[name] for u in units]
            self._put(name, axis, np.stack(new), source, _ones(units), _gradient_scales(units))

    def widen_channels(self, edit: WidthEdit, number: int, step: Step) -> None:
        units = _units(edit)
        for name in self.values:
            axis = self.layer.variable_axes[name].channel
            if axis is None:
                continue
            old = np.moveaxis(self.values[name], axis, 0)
            arriving = channel_maps(edit.site, len(units))[step.source]
            grown = step.view.variable_map(name, arriving)
            before = step.view.variable_map(name, step.incoming)
            new = np.empty((grown.size, *old.shape[1:]), dtype=old.dtype)
            source = np.empty(grown.size, dtype=np.int64)
            scale = np.empty(grown.size)
            for row, unit in enumerate(units):
                where = grown.index[row]
                parent = unit if isinstance(unit, int) else unit.source
                known = before.index[parent] if parent != NEWBORN else NEWBORN
                source[where] = known
                scale[where] = 1.0 if isinstance(unit, int) else unit.gradient_scale
                if isinstance(unit, int):
                    new[where] = old[known]
                else:
                    new[where] = np.moveaxis(unit.path[number][name], axis, 0)
            self._put(name, axis, new, source, np.ones(grown.size), scale)

    def widen_inputs(self, edit: WidthEdit, leaf: Leaf, consumer: int) -> None:
        units = _units(edit)
        for name in self.values:
            axis = self.layer.variable_axes[name].fan_in
            if axis is None:
                continue
            old = np.moveaxis(self.values[name], axis, 0)
            fold = None
            if edit.removed:
                fold, constant = _fold(edit, leaf)
                self._absorb(np.tensordot(constant, old, axes=1))
                old = np.tensordot(fold, old, axes=1)
            grown = channel_maps(edit.site, len(units))[leaf.tensor]
            new = np.zeros((grown.size, *old.shape[1:]), dtype=old.dtype)
            source = np.full(grown.size, NEWBORN, dtype=np.int64)
            share = np.ones(grown.size)
            for row, unit in enumerate(units):
                where = grown.index[row]
                if not isinstance(unit, int) and unit.source == NEWBORN:
                    new[where] = self._newborn_rows(unit.fan_out[consumer], name, axis)
                    continue
                known = leaf.channels.index[unit if isinstance(unit, int) else unit.source]
                source[where] = known
                share[where] = 1.0 if isinstance(unit, int) else unit.fan_out[consumer]
                new[where] = old[known] * share[where[0]]
            ones = np.ones(grown.size)
            self._put(name, axis, new, source, share, ones, newborn_zero=True, fold=fold)

    def _absorb(self, constant: np.ndarray) -> None:
        """Adds to the bias what a constant input makes, `[..., outputs]` by tap."""
        if constant.any():
            made = constant.reshape(-1, constant.shape[-1]).sum(axis=0)
            self.values["bias"] = self.values["bias"] + made
            self.moved.add("bias")

    def _newborn_rows(self, rows: np.ndarray, name: str, axis: int) -> np.ndarray:
        """`[T, B, O]` of a new unit as `[B, ...]`, in the layout of the kernel behind `axis`.

        The rows know the outputs the layer had; outputs that are new descend from old ones, whose
        weights they take over, or from none, and then start at zero.
        """
        value = self.values[name]
        out_axis = self.layer.variable_axes[name].fan_out % value.ndim
        outputs = next(
            (s.source for s in self.sources[name] if s.axis == out_axis), np.arange(rows.shape[2])
        )
        inherited = np.where(outputs == NEWBORN, 0.0, rows[:, :, outputs])
        spatial = [n for a, n in enumerate(value.shape) if a not in (axis % value.ndim, out_axis)]
        blocks = np.moveaxis(inherited, 1, 0)
        rows = blocks.reshape(len(blocks), *spatial, value.shape[out_axis])
        return np.moveaxis(rows, -1, out_axis + (out_axis < axis % value.ndim))

    def _put(
        self, name, axis, new, source, value_scale, gradient_scale, newborn_zero=False, fold=None
    ):
        ndim = self.values[name].ndim
        self.values[name] = np.ascontiguousarray(np.moveaxis(new, 0, axis))
        self.sources[name].append(
            AxisSource(axis % ndim, source, value_scale, gradient_scale, newborn_zero, fold)
        )


def _precise(values: np.ndarray) -> np.ndarray:
    """The values in float32, or as they are if they are more precise."""
    return values.astype(np.promote_types(values.dtype, np.float32))


def _source(units) -> np.ndarray:
    return np.array([unit if isinstance(unit, int) else unit.source for unit in units])


def _ones(units) -> np.ndarray:
    return np.ones(len(units))


def _gradient_scales(units) -> np.ndarray:
    return np.array([1.0 if isinstance(unit, int) else unit.gradient_scale for unit in units])


def inherited(change: VariableChange, old: np.ndarray) -> np.ndarray:
    """Another set of the variable's old values, such as the best weights so far, widened.

    The function those weights computed is unchanged: children take their parent's values without
    theta, and newborn units have no say. Only where units were removed is it another one; the
    same units stand in for them, in the same shares, as in the model.
    """
    value = _precise(np.asarray(old))
    for source in change.sources:
        known = source.source != NEWBORN
        shape = [-1 if axis == source.axis else 1 for axis in range(value.ndim)]
        value = source.folded(value)
        taken = np.take(value, np.where(known, source.source, 0), axis=source.axis)
        taken = taken * source.value_scale.reshape(shape)
        value = np.where(known.reshape(shape), taken, 0.0)
    for source in change.sources:
        if not source.newborn_zero:
            shape = [-1 if axis == source.axis else 1 for axis in range(value.ndim)]
            value = np.where((source.source == NEWBORN).reshape(shape), change.value, value)
    return value.astype(np.asarray(old).dtype)
