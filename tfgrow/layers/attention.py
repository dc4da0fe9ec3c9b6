"""MultiHeadAttention and GroupQueryAttention, whose heads can grow.

A unit of attention is a key/value head with the query heads that read it: of MultiHeadAttention
one each, of GroupQueryAttention `num_query_heads / num_key_value_heads`. Taking or making whole
units keeps that quotient what it is, touches no other unit, and lets the halves of a unit compute
what it did; single query heads could only come and go in all groups at once. The layer's output is
a sum over its units, and so is unchanged by one whose part of the output projection is zero.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from tfgrow.layers.growable import Axes, Growable


class Attention(Growable):
    """What tfgrow asks of an attention layer; the Keras class beside it brings the rest.

    Layouts: the incoming weights of `n` units are `[n, heads, inputs, size]` and their biases
    `[n, heads, size]`, the heads being those of one unit; what they see is their *context*
    `[N, T, n, depth]`, of which the output projection `[n, depth, outputs]` makes the output.
    """

    sublayers: ClassVar[Mapping[str, str]] = {
        "query": "_query_dense",
        "key": "_key_dense",
        "value": "_value_dense",
        "gate": "_gate_dense",
    }
    output_sublayer: ClassVar[str] = "_output_dense"
    variable_axes = {
        "_output_dense.kernel": Axes(),
        "_output_dense.bias": Axes(),
        **{
            f"_{name}_dense.{variable}": Axes()
            for name in ("query", "key", "value", "gate")
            for variable in ("kernel", "bias")
        },
    }

    @property
    def attention_units(self) -> int:
        """Number of units: key/value heads."""
        raise NotImplementedError

    @property
    def query_heads(self) -> int:
        """Number of query heads of one unit."""
        return 1

    def unit_attributes(self, units: int) -> dict[str, Any]:
        """The config attributes of the layer with so many units, its sub-layers' among them."""
        raise NotImplementedError

    def unit_build_shapes(self, units: int) -> dict[str, dict[str, tuple]]:
        """Build shapes of sub-layers, by attribute, with so many units; of those that differ."""
        config = self.output_projection.get_build_config() or {}
        heads = units * self.query_heads
        return {
            self.output_sublayer: {
                name: (*shape[:-2], heads, shape[-1]) for name, shape in config.items()
            }
        }

    def growth_blocked(self):
        if not self.built:
            return f"layer '{self.name}' is not built"
        if getattr(self, "_attention_axes", None) not in (None, (1,)):
            return (
                f"layer '{self.name}' attends over axes {self._attention_axes}; heads grow where "
                "it attends over the one axis between batch and channels"
            )
        every = [*self.projections().values(), self.output_projection]
        if any(d.lora_enabled or getattr(d, "quantization_mode", None) for d in every):
            return f"layer '{self.name}' has LoRA or quantized weights, which can't be resized"
        return None

    def call_blocked(self, called: Mapping[str, Any]) -> str | None:
        """Why heads can't grow in a call with these arguments; None if they can."""
        if len(called["query"].shape) != 3 or len(called["value"].shape) != 3:
            return (
                f"layer '{self.name}' reads tensors of shapes {tuple(called['query'].shape)} and "
                f"{tuple(called['value'].shape)}; heads grow where they are [batch, time, channels]"
            )
        if called.get("return_attention_scores"):
            return (
                f"layer '{self.name}' is called with return_attention_scores=True, which has an "
                "entry per head"
            )
        mask = called.get("attention_mask")
        if mask is not None and len(mask.shape) > 3 and mask.shape[-3] != 1:
            return f"layer '{self.name}' is called with an attention_mask of each head's own"
        return None

    def called(self, args, kwargs) -> dict[str, Any]:
        """The arguments of a call by name."""
        found = dict(inspect.signature(self.call).bind(*args, **kwargs).arguments)
        if found.get("key") is None:
            found["key"] = found["value"]
        return found

    def projections(self) -> dict[str, Any]:
        """The sub-layers that project the inputs, by name."""
        found = {name: getattr(self, path, None) for name, path in self.sublayers.items()}
        return {name: layer for name, layer in found.items() if layer is not None}

    @property
    def output_projection(self) -> Any:
        """The sub-layer that projects the contexts to the output."""
        return getattr(self, self.output_sublayer)

    def growable_variables(self):
        """All variables, by dotted path: the sub-layers hold them."""
        found = {}
        for path in self.variable_axes:
            sublayer, name = path.split(".")
            value = getattr(getattr(self, sublayer, None), name, None)
            if value is not None:
                found[path] = value
        return found

    def head_axis(self, path: str) -> int | None:
        """The axis of a variable that heads lie on; None of the output's bias."""
        sublayer, variable = path.split(".")
        if sublayer == self.output_sublayer:
            return 0 if variable == "kernel" else None
        return 1 if variable == "kernel" else 0

    def unit_weights(self) -> dict[str, Any]:
        """The incoming weights of all units in float32: `"query"`, `"query_bias"`, `"key"`..."""
        found = {}
        for name, layer in self.projections().items():
            found[name] = self._by_unit(ops.moveaxis(_precise(layer.kernel), 1, 0))
            if layer.bias is not None:
                found[f"{name}_bias"] = self._by_unit(_precise(layer.bias))
        return found

    def unit_projections(self) -> Any:
        """The part of the output projection that each unit has, `[units, depth, outputs]`."""
        kernel = _precise(self.output_projection.kernel)
        heads, width = kernel.shape[:2]
        units = self.attention_units
        return ops.reshape(kernel, (units, heads // units * width, -1))

    def _by_unit(self, by_head):
        units = self.attention_units
        shape = (units, by_head.shape[0] // units, *by_head.shape[1:])
        return ops.reshape(by_head, shape)

    def as_heads(self, path: str, values: np.ndarray) -> np.ndarray:
        """Values of units, as above, in the layout of a variable but with the heads first.

        Args:
          path: the variable.
          values: `[n, heads, ...]`, or `[n, depth, outputs]` for the output projection.
        """
        variable = operator.attrgetter(path)(self)
        rest = [n for axis, n in enumerate(variable.shape) if axis != self.head_axis(path)]
        return values.reshape(-1, *rest)

    def contexts(self, called: Mapping[str, Any], weights: Mapping[str, Any]):
        """What units with the given incoming weights see, in inference mode: `[N, T, n, depth]`.

        Args:
          called: the arguments of the layer's call, computed.
          weights: tensors as from `unit_weights`, of any number of units.
        """
        query, key, value = (
            _project(called[name], weights[name], weights.get(f"{name}_bias"))
            for name in ("query", "key", "value")
        )
        mask = self._compute_attention_mask(
            called["query"],
            called["value"],
            **{name: called.get(name) for name in _MASKS},
            use_causal_mask=bool(called.get("use_causal_mask")),
        )
        read = self.query_heads
        key, value = (ops.repeat(x, read, axis=2) if read > 1 else x for x in (key, value))
        seen, _ = self._compute_attention(query, key, value, attention_mask=mask, training=False)
        if "gate" in weights:
            gate = _project(called["query"], weights["gate"], weights.get("gate_bias"))
            seen = seen * ops.sigmoid(gate)
        units, width = weights["key"].shape[0], weights["value"].shape[3]
        return ops.reshape(seen, (-1, ops.shape(query)[1], units, read * width))

    def unit_cost(self, called: Mapping[str, Any]) -> tuple[int, int]:
        """Parameters and FLOPs per sample of one unit; unknown lengths count as 1."""
        weights = self.unit_weights()
        sizes = {name: math.prod(value.shape[1:]) for name, value in weights.items()}
        outputs = math.prod(self.output_projection.kernel.shape) // self.attention_units
        times = {name: _length(called[name]) for name in ("query", "key", "value")}
        times["gate"] = times["query"]
        adds = sum(times[name] * sizes[name] for name in times if name in sizes)
        adds += times["query"] * outputs
        seen = times["query"] * times["value"] * self.query_heads
        adds += seen * (weights["key"].shape[3] + weights["value"].shape[3])
        return sum(sizes.values()) + outputs, 2 * adds


_MASKS = ("query_mask", "value_mask", "key_mask", "attention_mask")


def _precise(variable):
    return ops.cast(ops.convert_to_tensor(variable), "float32")


def _project(inputs, kernel, bias):
    """`[N, T, inputs]` to `[N, T, n * heads, size]`."""
    *units, channels, size = kernel.shape
    heads = units[0] * units[1]
    made = ops.einsum("ntc,hcs->nths", inputs, ops.reshape(kernel, (heads, channels, size)))
    return made if bias is None else made + ops.reshape(bias, (heads, size))


def _length(tensor) -> int:
    return math.prod(size for size in tensor.shape[1:-1] if size is not None)


@keras.saving.register_keras_serializable(package="tfgrow")
class MultiHeadAttention(Attention, keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` whose heads can grow. Same arguments, weights and outputs.

    Example:

    >>> import numpy as np, tfgrow
    >>> layer = tfgrow.layers.MultiHeadAttention(num_heads=2, key_dim=3)
    >>> x = np.ones((2, 5, 4), "float32")
    >>> layer(x, x).shape
    TensorShape([2, 5, 4])
    """

    stock_class = keras.layers.MultiHeadAttention

    @property
    def attention_units(self):
        return self.num_heads

    def unit_attributes(self, units):
        keys, values = self.key_dim, self.value_dim
        shapes = {"query": (units, keys), "key": (units, keys), "value": (units, values)}
        shapes["gate"] = (units, values)
        return {"_num_heads": units, **_output_shapes(self, shapes)}


@keras.saving.register_keras_serializable(package="tfgrow")
class GroupQueryAttention(Attention, keras.layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention`, growable by whole groups of heads.

    Same arguments, weights and outputs. A unit is a key/value head with the query heads that read
    it: `num_query_heads / num_key_value_heads` stays what it is.

    Example:

    >>> import numpy as np, tfgrow
    >>> layer = tfgrow.layers.GroupQueryAttention(3, num_query_heads=4, num_key_value_heads=2)
    >>> x = np.ones((2, 5, 4), "float32")
    >>> layer(x, x).shape
    TensorShape([2, 5, 4])
    """

    stock_class = keras.layers.GroupQueryAttention

    @property
    def attention_units(self):
        return self.num_key_value_heads

    @property
    def query_heads(self):
        return self.num_repeats

    def unit_attributes(self, units):
        queries, size = units * self.num_repeats, self.head_dim
        shapes = {"query": (queries, size), "key": (units, size), "value": (units, size)}
        shapes["gate"] = (queries, size)
        heads = {"num_query_heads": queries, "num_key_value_heads": units}
        return {**heads, **_output_shapes(self, shapes)}


def _output_shapes(attention: Attention, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What the projections say of the last axes of their outputs, by attribute."""
    return {
        f"{attention.sublayers[name]}.partial_output_shape": (
            *layer.partial_output_shape[: -len(shapes[name])],
            *shapes[name],
        )
        for name, layer in attention.projections().items()
    }
