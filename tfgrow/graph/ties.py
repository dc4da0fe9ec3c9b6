"""Weights that several layers use: an output layer that reads its encoder's kernel, for one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import keras

from tfgrow._keras import operations_within


@dataclasses.dataclass(frozen=True)
class Tie:
    """What a layer has in common with another: one weight, at least."""

    layer: str
    weight: str
    other: str

    def __str__(self) -> str:
        return f"layer '{self.layer}' has the weight '{self.weight}' in common with '{self.other}'"


def ties_between(operations: Iterable[Any]) -> dict[int, Tie]:
    """By id of each layer that has weights in common with another of the layers: how it is tied."""
    owners: dict[int, keras.layers.Layer] = {}
    ties: dict[int, Tie] = {}
    for layer in {id(operation): operation for operation in operations}.values():
        for weight in getattr(layer, "weights", ()):
            owner = owners.setdefault(id(weight), layer)
            if owner is not layer:
                ties.setdefault(id(owner), Tie(owner.name, weight.path, layer.name))
                ties.setdefault(id(layer), Tie(layer.name, weight.path, owner.name))
    return ties


def ties_within(model: keras.Model) -> dict[int, Tie]:
    """`ties_between` all layers of a model, and of the models in it."""
    parts = operations_within(model)
    return ties_between(part for part in parts if not isinstance(part, keras.Model))
