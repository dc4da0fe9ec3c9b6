"""Width edits as new values of variables: pure, nothing is touched.

Edits of neighbouring sites meet in one kernel, as producer of the one and consumer of the other.
The output side is built first, in the old input channels; the input side then widens all of it, so
that a split's deviation theta is inherited by the halves of a split input channel as weights are.
Channels of several sites may lie on one axis, behind a concatenation: it is widened once, for all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from tfgrow.graph.channels import Descent, Flow, Owners, descend
from tfgrow.graph.constants import absorber_of
from tfgrow.graph.nodes import Node
from tfgrow.graph.sites import parameter_name
from tfgrow.layers.growable import Growable
from tfgrow.layers.registry import channelwise_view
from tfgrow.types import (
    NEWBORN,
    AxisSource,
    ChannelMap,
    HeadsEdit,
    KernelEdit,
    LayerChange,
    NewUnit,
    VariableChange,
    WidthEdit,
)

MOST_DEPENDENT = 100.0
"""Condition number above which units that stand in for each other can't all be removed."""

Sized = TypeVar("Sized", WidthEdit, HeadsEdit)


def merge_edits(edits: Sequence[Sized]) -> list[Sized]:
    """One edit per site, of units or of heads.

    Raises:
      ValueError: if two edits change the same unit.
    """
    merged: dict[str, Sized] = {}
    for edit in edits:
        name = edit.site.name
        merged[name] = _merged(merged[name], edit) if name in merged else edit
    for edit in merged.values():
        if len(edit.removed) >= edit.site.units:
            raise ValueError(
                f"All {edit.site.units} units of site '{edit.site.name}' would be removed; leave "
                "one or more."
            )
    return list(merged.values())


def _merged(known: Any, edit: Any) -> Any:
    twice = sorted(_edited(known) & _edited(edit))
    if twice:
        raise ValueError(
            f"Unit {twice[0]} of site '{edit.site.name}' is edited twice at once; choose one "
            "of its candidates."
        )
    return dataclasses.replace(
        known,
        replaced={**known.replaced, **edit.replaced},
        appended=(*known.appended, *edit.appended),
        removed={**known.removed, **edit.removed},
    )


def _edited(edit: WidthEdit | HeadsEdit) -> set[int]:
    return set(edit.replaced) | set(edit.removed)


def layer_changes(edits: Sequence[WidthEdit | KernelEdit]) -> list[LayerChange]:
    """What a set of edits does to every layer it reaches."""
    work: dict[int, _LayerWork] = {}
    for edit in edits:
        if isinstance(edit, KernelEdit):
            layer = edit.site.producers[edit.producer].operation
            if id(layer) in work:
                raise ValueError(f"The kernel of layer '{layer.name}' is enlarged twice at once.")
            _work(work, layer).enlarge(edit)
    wider = merge_edits([edit for edit in edits if isinstance(edit, WidthEdit)])
    if wider:
        _widen(work, {edit.site.producers[0].index: edit for edit in wider}, wider[0].site.graph)
    return [item.change() for item in work.values()]


def _widen(work: dict, merged: dict[int, WidthEdit], graph) -> None:
    widening = _Widening(graph, merged)
    for edit in merged.values():
        for number, node in enumerate(edit.site.producers):
            producer = _work(work, node.operation)
            producer.attributes.update(node.operation.width_attributes(edit.new_width))
            producer.widen_outputs(edit, number)
    reached = {  # by index: candidates made by several calls are of several traces of one model
        item.index: item
        for edit in merged.values()
        for item in (
            *(step.node for step in edit.site.steps),
            *(node for leaf in edit.site.leaves for node in leaf.consumers),
        )
    }
    for node in reached.values():
        if isinstance(node.operation, Growable):
            reader = _work(work, node.operation)
            (reader.widen_inputs if node.mixing else reader.widen_channels)(widening, node)
        view = None if node.mixing or len(node.inputs) > 1 else channelwise_view(node.operation)
        if view is not None:
            attributes = view.resized_attributes(widening.size(node.inputs[0]))
            if attributes:
                _work(work, node.operation).attributes.update(attributes)
    for node in reached.values():
        if isinstance(node.operation, Growable) and node.mixing:
            _place_constant(work, graph, node)


def _place_constant(work: dict, graph, node: Node) -> None:
    """Adds the constant that stands in for a layer's inputs where it can be added."""
    constant = _work(work, node.operation).constant
    if constant is None:
        return
    absorber = absorber_of(graph, node)
    if absorber is None:
        raise ValueError(
            f"Layer '{node.name}' has no bias, and no BatchNormalization right behind it, that a "
            "constant could be added to; remove the units with offset 0."
        )
    _work(work, absorber.layer).shift(absorber.variable, absorber.sign * constant)


class _Widening:
    """What a set of edits does to the last axis of every tensor.

    Attributes:
      edits: by index of the site's first producer.
    """

    def __init__(self, graph, edits: dict[int, WidthEdit]):
        self.edits = edits
        self._before = Flow(graph)
        self._after = Flow(
            graph,
            {node.index: edit.new_width for edit in edits.values() for node in edit.site.producers},
            tied_as=self._before,
        )
        self._parents = {owner: source_of(units_of(edit)) for owner, edit in edits.items()}

    def axis(self, tensor: int, onto: Callable | None = None) -> _Axis:
        """How the last axis of a tensor changes.

        Args:
          tensor: its id.
          onto: for an axis of a variable that belongs to a layer reading the tensor: where channels
            lie on it, given where they lie on the tensor.
        """
        sides = []
        for flow in (self._before, self._after):
            size = flow.sizes[tensor]
            assert size is not None
            owners = flow.at(tensor)
            if onto is not None:
                owners = {owner: onto(at) for owner, at in owners.items()}
                size = onto(ChannelMap.identity(size)).size
            sides.append((owners, size))
        (before, old), (after, new) = sides
        descent = descend(before, after, (old, new), self._parents)
        return _Axis(before, descent)

    def size(self, tensor: int) -> int:
        """Length of a tensor's last axis afterwards."""
        size = self._after.sizes[tensor]
        assert size is not None
        return size

    def consumer_of(self, edit: WidthEdit, node: Node) -> int:
        """The number of a node among the consumers of an edit's site."""
        consumers = [n.index for leaf in edit.site.leaves for n in leaf.consumers]
        return consumers.index(node.index)


@dataclasses.dataclass(frozen=True, eq=False)
class _Axis:
    """An axis on which channels lie, before and after an edit."""

    before: Owners
    descent: Descent

    @property
    def size(self) -> int:
        return len(self.descent.source)


def _work(work: dict, layer) -> _LayerWork:
    return work.setdefault(id(layer), _LayerWork(layer))


def units_of(edit: Any) -> list:
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


def _fold(edit: WidthEdit, place: ChannelMap) -> tuple[np.ndarray, np.ndarray]:
    """How the consumers' rows `[size]` of removed units are taken over by others.

    Returns:
      `[size, size]`, what is added to the rows' own part in the rows, and `[size]`, the constant
      that stands in for an input: what the rows make of it is added to the response.
    """
    gone, shares, offsets = _stand_ins(edit)
    fold, constant = np.zeros((place.size, place.size)), np.zeros(place.size)
    for unit, share, offset in zip(gone, shares, offsets, strict=True):
        mine = place.index[unit]
        constant[mine] = offset
        for other in np.flatnonzero(share):
            fold[place.index[other], mine] += share[other]
    return fold, constant


class _LayerWork:
    """A layer's variables on their way to their new values."""

    def __init__(self, layer):
        self.layer = layer
        self.attributes: dict[str, Any] = {}
        self.values = {
            name: precise(np.asarray(variable))
            for name, variable in getattr(layer, "growable_variables", dict)().items()
        }
        self.sources: dict[str, list[AxisSource]] = {name: [] for name in self.values}
        self.constant: np.ndarray | None = None  # what is to be added to the response, `[outputs]`
        self._shifts: dict[str, np.ndarray] = {}  # by variable, what is added to it in the end
        self._larger: list[tuple[int, int]] = []  # taps before and behind the old kernel, by axis
        self._ring: np.ndarray | None = None  # what lies there, in the kernel's layout

    def change(self) -> LayerChange:
        return LayerChange(
            self.layer,
            self.attributes,
            {
                name: self._change_of(name, value)
                for name, value in self.values.items()
                if self.sources[name] or name in self._shifts
            },
        )

    def _change_of(self, name: str, value: np.ndarray) -> VariableChange:
        shift = self._shifts.get(name, 0.0)
        return VariableChange((value + shift).astype(value.dtype), tuple(self.sources[name]), shift)

    def shift(self, name: str, by: np.ndarray) -> None:
        """Adds to a variable as it will be in the end."""
        self._shifts[name] = self._shifts.get(name, 0.0) + by

    def enlarge(self, edit: KernelEdit) -> None:
        old = self.values["kernel"]
        self._larger = [
            (start, new - start - size)
            for start, new, size in zip(edit.offset, edit.ring.shape, old.shape, strict=False)
        ]
        ring = np.array(edit.ring, old.dtype)
        inner = zip(edit.offset, old.shape, strict=False)
        ring[tuple(slice(start, start + size) for start, size in inner)] = 0.0
        self.values["kernel"] = self._surrounded(old) + ring
        self._ring = ring
        for axis, (before, behind) in enumerate(self._larger):
            source = np.pad(np.arange(old.shape[axis]), (before, behind), constant_values=NEWBORN)
            ones = np.ones(len(source))
            kept = AxisSource(axis, source, ones, ones, newborn_zero=True)
            self.sources["kernel"].append(kept)
        self.attributes.update(edit.attributes)

    def _surrounded(self, kernel: np.ndarray) -> np.ndarray:
        """A kernel of the old size, spatial axes first, with zeros around it."""
        return np.pad(kernel, [*self._larger, *[(0, 0)] * (kernel.ndim - len(self._larger))])

    def widen_outputs(self, edit: WidthEdit, producer: int) -> None:
        units = units_of(edit)
        source = source_of(units)
        for name in self.values:
            axis = self.layer.variable_axes[name].fan_out
            if axis is None:
                continue
            old = np.moveaxis(self.values[name], axis, 0)
            theirs = parameter_name(name, producer)
            new = [
                old[unit] if isinstance(unit, int) else self._made(name, axis, unit, theirs)
                for unit in units
            ]
            self._put(name, axis, np.stack(new), source, _ones(units), _gradient_scales(units))

    def _made(self, name: str, axis: int, unit: NewUnit, theirs: str) -> np.ndarray:
        """The incoming weights of a new unit."""
        parent = None if unit.source == NEWBORN else unit.source
        return self._with_ring(name, axis, unit.fan_in[theirs], parent)

    def _with_ring(self, name: str, axis: int, weights, source) -> np.ndarray:
        """Weights of new units, of an enlarged kernel in its larger size.

        Args:
          name: of the variable.
          axis: of the variable, along which units lie.
          weights: of one unit, without that axis, or of several, with it.
          source: the unit or units there whose ring they have, too; None if there is none.
        """
        weights = np.asarray(weights)
        if name != "kernel" or self._ring is None:
            return weights
        larger = self._surrounded(weights)
        return larger if source is None else larger + np.take(self._ring, source, axis)

    def widen_channels(self, widening: _Widening, node: Node) -> None:
        view = channelwise_view(self.layer)
        assert view is not None
        for name in self.values:
            axis = self.layer.variable_axes[name].channel
            if axis is not None:
                onto = functools.partial(view.variable_map, name)
                self._widen_channel_axis(widening, node, name, axis, onto)

    def _widen_channel_axis(self, widening, node, name, axis, onto) -> None:
        resized = widening.axis(node.inputs[0], onto)
        source = resized.descent.source
        old = np.moveaxis(self.values[name], axis, 0)
        new, scale = old[np.maximum(source, 0)], np.ones(resized.size)
        for owner, edit in widening.edits.items():
            if owner not in resized.descent.places:
                continue
            number = [step.node.index for step in edit.site.steps].index(node.index)
            for row, unit in enumerate(units_of(edit)):
                if isinstance(unit, NewUnit):
                    where = resized.descent.places[owner].index[row]
                    newborn = unit.source == NEWBORN
                    theirs = None if newborn else resized.before[owner].index[unit.source]
                    made = self._with_ring(name, axis, unit.path[number][name], theirs)
                    new[where] = np.moveaxis(made, axis, 0)
                    scale[where] = unit.gradient_scale
        self._put(name, axis, new, source, np.ones(resized.size), scale)

    def widen_inputs(self, widening: _Widening, node: Node) -> None:
        for name in self.values:
            axis = self.layer.variable_axes[name].fan_in
            if axis is not None:
                self._widen_input_axis(widening, node, name, axis)

    def _widen_input_axis(self, widening, node, name, axis) -> None:
        resized = widening.axis(node.inputs[0])
        source = resized.descent.source
        old = np.moveaxis(self.values[name], axis, 0)
        old, fold = self._folded(widening, resized, old)
        share = np.ones(resized.size)
        newborn: list[tuple[np.ndarray, np.ndarray]] = []
        for owner, edit in widening.edits.items():
            if owner not in resized.descent.places:
                continue
            consumer = widening.consumer_of(edit, node)
            for row, unit in enumerate(units_of(edit)):
                where = resized.descent.places[owner].index[row]
                if isinstance(unit, NewUnit) and unit.source == NEWBORN:
                    newborn.append((where, unit.fan_out[consumer]))
                elif isinstance(unit, NewUnit):
                    share[where] = unit.fan_out[consumer]
        known = (source != NEWBORN).reshape(-1, *[1] * (old.ndim - 1))
        new = np.where(known, old[np.maximum(source, 0)] * share.reshape(known.shape), 0.0)
        new = new.astype(old.dtype)
        for where, rows in newborn:
            new[where] = self._newborn_rows(rows, name, axis)
        ones = np.ones(resized.size)
        self._put(name, axis, new, source, share, ones, newborn_zero=True, fold=fold)

    def _folded(self, widening: _Widening, resized: _Axis, old: np.ndarray):
        """Rows after those of removed units were taken over by others, and how they were."""
        removing = {
            owner: edit
            for owner, edit in widening.edits.items()
            if edit.removed and owner in resized.before
        }
        if not removing:
            return old, None
        fold = np.eye(len(old))
        constant = np.zeros(len(old))
        for owner, edit in removing.items():
            more, offsets = _fold(edit, resized.before[owner])
            fold, constant = fold + more, constant + offsets
        if constant.any():
            made = np.tensordot(constant, old, axes=1)
            self.constant = made.reshape(-1, made.shape[-1]).sum(axis=0)
        return np.tensordot(fold, old, axes=1).astype(old.dtype), fold

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
        before = [n - sum(pads) for n, pads in zip(spatial, self._larger, strict=False)]
        inherited = inherited.reshape(*(before or spatial), *inherited.shape[1:])
        blocks = np.moveaxis(self._surrounded(inherited), -2, 0)
        made = blocks.reshape(len(blocks), *spatial, value.shape[out_axis])
        return np.moveaxis(made, -1, out_axis + (out_axis < axis % value.ndim))

    def _put(
        self, name, axis, new, source, value_scale, gradient_scale, newborn_zero=False, fold=None
    ):
        ndim = self.values[name].ndim
        self.values[name] = np.ascontiguousarray(np.moveaxis(new, 0, axis))
        self.sources[name].append(
            AxisSource(axis % ndim, source, value_scale, gradient_scale, newborn_zero, fold)
        )


def precise(values: np.ndarray) -> np.ndarray:
    """The values in float32, or as they are if they are more precise."""
    return values.astype(np.promote_types(values.dtype, np.float32))


def source_of(units) -> np.ndarray:
    """Per new unit, the old one it descends from, or `NEWBORN`."""
    return np.array([unit if isinstance(unit, int) else unit.source for unit in units])


def _ones(units) -> np.ndarray:
    return np.ones(len(units))


def _gradient_scales(units) -> np.ndarray:
    return np.array([1.0 if isinstance(unit, int) else unit.gradient_scale for unit in units])


def inherited(change: VariableChange, old: np.ndarray) -> np.ndarray:
    """Another set of the variable's old values, such as the best weights so far, widened.

    The function those weights computed is unchanged: children take their parent's values without
    theta, and newborn units have no say. Only where units were removed is it another one; the
    same units stand in for them, in the same shares and with the same constant, as in the model.
    """
    value = precise(np.asarray(old))
    for source in change.sources:
        known = source.source != NEWBORN
        shape = [-1 if axis == source.axis else 1 for axis in range(value.ndim)]
        value = source.folded(value)
        taken = np.take(value, np.where(known, source.source, 0), axis=source.axis)
        taken = taken * source.value_scale.reshape(shape)
        value = np.where(known.reshape(shape), taken, 0.0)
    value = value + change.shift
    for source in change.sources:
        if not source.newborn_zero:
            shape = [-1 if axis == source.axis else 1 for axis in range(value.ndim)]
            value = np.where((source.source == NEWBORN).reshape(shape), change.value, value)
    return value.astype(np.asarray(old).dtype)
