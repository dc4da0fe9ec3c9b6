"""Whether changes of layers fit them: all of it is checked before anything is touched."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import keras
import numpy as np

from tfgrow._keras import graph_of, operations_within
from tfgrow.graph.ties import ties_within
from tfgrow.types import LayerChange, VariableChange


def check_changes(model: keras.Model, changes: Sequence[LayerChange]) -> None:
    """Refuses changes that can't be made, see `tfgrow.surgery.rebuild.apply_changes`."""
    if graph_of(model) is None:
        if not isinstance(model, keras.Sequential):
            raise TypeError(
                f"Surgery needs a Functional or Sequential model. Found {model!r} of type "
                f"{type(model).__name__}. Rebuild it with the functional API."
            )
        raise ValueError(
            f"Model '{model.name}' is not built, so that it has no graph to edit. Give it an Input "
            "or call it on a batch first."
        )
    members = {id(operation) for operation in operations_within(model)}
    ties = ties_within(model)
    for index, change in enumerate(changes):
        layer = change.layer
        if id(layer) not in members:
            raise ValueError(
                f"Layer '{layer.name}' is not a node of the graph of model '{model.name}'. Edit "
                "layers that the model, or a Functional or Sequential model in it, calls itself."
            )
        if any(layer is other.layer for other in changes[:index]):
            raise ValueError(f"Layer '{layer.name}' is changed twice. Merge its changes into one.")
        if id(layer) in ties:
            raise ValueError(f"Model '{model.name}': {ties[id(layer)]}: it can't change alone.")
        _check_layer_change(change)


def _check_layer_change(change: LayerChange) -> None:
    layer = change.layer
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        raise ValueError(
            f"Layer '{layer.name}' has LoRA or quantized weights, which cannot be resized. Grow "
            "the model first, then enable LoRA or quantize it."
        )
    for name in change.attributes:
        if not _has(layer, name):
            raise ValueError(
                f"Layer '{layer.name}' ({type(layer).__name__}) has no attribute '{name}' to set."
            )
    own = {id(variable): variable for variable in layer.weights}
    for name, variable_change in change.variables.items():
        variable = operator.attrgetter(name)(layer) if _has(layer, name) else None
        if id(variable) not in own:
            raise ValueError(
                f"Layer '{layer.name}' ({type(layer).__name__}) has no variable '{name}'. It has "
                f"{sorted(own_variable.name for own_variable in own.values())}."
            )
        _check_variable_change(
            f"Variable '{name}' of layer '{layer.name}'", variable, variable_change
        )


def _check_variable_change(what: str, variable: keras.Variable, change: VariableChange) -> None:
    old, new = tuple(variable.shape), np.shape(change.value)
    if len(old) != len(new):
        raise ValueError(f"{what} has shape {old}; its new value has shape {new}, of another rank.")
    sized = {source.axis: source for source in change.sources}
    if len(sized) != len(change.sources):
        raise ValueError(f"{what}: two sources speak of one axis. Compose them into one.")
    for axis in range(len(old)):
        if axis not in sized and old[axis] != new[axis]:
            raise ValueError(
                f"{what} changes from {old} to {new}, and no AxisSource says how axis {axis} "
                "descends from the old one. Add one."
            )
    for axis, source in sized.items():
        if not 0 <= axis < len(old):
            raise ValueError(f"{what} of shape {old} has no axis {axis}: use 0 to {len(old) - 1}.")
        lengths = {len(source.source), len(source.value_scale), len(source.gradient_scale)}
        if lengths != {new[axis]}:
            raise ValueError(
                f"{what}: the AxisSource of axis {axis} has {sorted(lengths)} entries, the new "
                f"value {new[axis]}."
            )
        if np.min(source.source) < -1 or np.max(source.source) >= old[axis]:
            raise ValueError(
                f"{what}: sources of axis {axis} lie between {np.min(source.source)} and "
                f"{np.max(source.source)}; expected -1 (newborn) to {old[axis] - 1}."
            )


def _has(layer: keras.Layer, path: str) -> bool:
    """Whether there is an attribute by that dotted path."""
    try:
        operator.attrgetter(path)(layer)
    except AttributeError:
        return False
    return True
