"""Edits a built Keras model in place: new variable values and shapes, and everything Keras derived.

The layer objects *and* the `keras.Variable` objects stay; only the backend variable that a
`keras.Variable` holds is exchanged. So the order of `layer.weights`, `model.trainable_variables`
and `optimizer.variables` (by which files store them), names, paths, regularizers, constraints and
trainable flags cannot change, no initializer runs, and no random state moves.

Of the code that mutates, only this file and `tfgrow.surgery.shapes` name private attributes of
Keras.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.models.functional import Functional
from keras.src.ops.function import map_graph
from keras.src.ops.node import Node
from keras.src.utils.tracking import DotNotTrackScope, TrackedList, Tracker
from tensorflow.python.framework import ops as tf_ops
from tensorflow.python.trackable.data_structures import ListWrapper, _DictWrapper

from tfgrow._keras import graph_of, nodes_of
from tfgrow.surgery.checks import check_changes
from tfgrow.surgery.shapes import refresh_graph
from tfgrow.types import LayerChange, VariableChange

STATEFUL = (
    keras.Operation,
    keras.KerasTensor,
    keras.Variable,
    keras.Metric,
    keras.Loss,
    keras.optimizers.Optimizer,
    keras.random.SeedGenerator,
    Node,
    Tracker,
)
"""Types of the objects of a model, and of its training, whose attributes an edit may change."""


@dataclasses.dataclass(frozen=True, eq=False)
class Replacement:
    """One variable that got a new value.

    Attributes:
      variable: the live Keras variable, which now holds `change.value`.
      old: its value before.
      change: what was asked for.
    """

    variable: keras.Variable
    old: np.ndarray
    change: VariableChange


def apply_changes(model: keras.Model, changes: Sequence[LayerChange]) -> tuple[Replacement, ...]:
    """Edits the layers of a built Functional or Sequential model in place.

    Sets attributes and variables, then renews what Keras derived from them: input specs, build
    configs, the shapes of all symbolic tensors downstream (in nested models too), and the compiled
    train, test and predict functions, if there were any. The optimizer is not touched: hand the
    result to `tfgrow.surgery.optimizer.grow_optimizer`. An error found in `changes` themselves is
    raised before anything is touched; others (a consumer that was forgotten) leave the model half
    edited: work inside `tfgrow.surgery.transaction.transaction`, or call `edit` there, which does
    all of it.

    Args:
      model: the model.
      changes: at most one per layer, of layers of the model or of models nested in it.

    Returns:
      What was replaced, in the order of `changes`.

    Raises:
      TypeError: `model` is not a Functional or Sequential model.
      ValueError: the model is not built, or a change does not fit its layer or the layers after it.

    Example:

    >>> import keras, numpy as np
    >>> from tfgrow.surgery import rebuild
    >>> from tfgrow.types import AxisSource, LayerChange, VariableChange
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1), keras.layers.Dense(3)])
    >>> first, second = model.layers
    >>> twice, one, half = np.zeros(2, int), np.ones(2), np.full(2, 0.5)
    >>> def doubled(value, axis, scale):
    ...     source = AxisSource(axis, twice, scale, one)
    ...     return VariableChange(np.repeat(value, 2, axis) * scale[0], (source,))
    >>> _ = rebuild.apply_changes(model, [
    ...     LayerChange(first, {"units": 2}, {"kernel": doubled(first.kernel.numpy(), 1, one),
    ...                                       "bias": doubled(first.bias.numpy(), 0, one)}),
    ...     LayerChange(second, {}, {"kernel": doubled(second.kernel.numpy(), 0, half)})])
    >>> first.output.shape, model.count_params()
    ((None, 2), 15)
    """
    changes = tuple(changes)
    check_changes(model, changes)
    replaced = []
    for change in changes:
        _set_attributes(change)
        for variable, variable_change in change.edited():
            old = variable.numpy()
            set_value(model, variable, variable_change.value)
            replaced.append(Replacement(variable, old, variable_change))
    refresh_graph(model, [change.layer for change in changes])
    renew_functions(model)
    return tuple(replaced)


def set_value(model: keras.Model, variable: keras.Variable, value: np.ndarray) -> None:
    """Gives a Keras variable a value of any shape of the same rank, in a new backend variable.

    The old backend variable, which compiled functions hold on to, keeps its value.

    Args:
      model: its distribution strategy places the new backend variable.
      variable: a variable of the model or of its optimizer.
      value: the new value; it is copied, and cast to the variable's dtype.
    """
    old = variable.value
    # A copy, because TensorFlow may build a tensor on the array's own memory and later update it.
    tensor = tf.cast(tf.constant(np.array(value)), old.dtype)
    with model.distribute_strategy.scope():
        variable._value = tf.Variable(
            tensor,
            # Not `variable.trainable`: tapes look here, and a frozen layer may be unfrozen later.
            trainable=old.trainable,
            name=old.name.split(":")[0],
            aggregation=old.aggregation,
            synchronization=old.synchronization,
        )
    variable._shape = tuple(np.shape(value))


def rekey_optimizer(optimizer: keras.optimizers.Optimizer) -> None:
    """Makes a built optimizer find slots and weight-decay exclusions of edited weights again.

    Optimizers know variables by the backend variable, which `set_value` exchanges.
    """
    indices = optimizer._trainable_variables_indices
    keys = {
        key: optimizer._var_key(optimizer._trainable_variables[index])
        for key, index in indices.items()
    }
    renamed = {keys[key]: index for key, index in indices.items()}
    refill_dict(indices, renamed)
    if excluded := getattr(optimizer, "_exclude_from_weight_decay", None):
        optimizer._exclude_from_weight_decay = {keys.get(key, key) for key in excluded}
    if cache := getattr(optimizer, "_exclude_from_weight_decay_cache", None):
        optimizer._exclude_from_weight_decay_cache = {
            keys.get(key, key): use for key, use in cache.items()
        }


def inner_models(model: keras.Model) -> list[keras.Model]:
    """The model and all models in it, at any depth."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.Model)]


def renew_functions(model: keras.Model) -> None:
    """Makes train, test and predict trace anew, where they existed. Works inside `fit`."""
    for inner in inner_models(model):
        if inner.train_function is not None:
            inner.make_train_function(force=True)
        if inner.test_function is not None:
            inner.make_test_function(force=True)
        # `predict` makes its own function whenever there is none.
        inner.predict_function = None
    _forget_train_graphs()


def _forget_train_graphs() -> None:
    """Lets go of the graphs of train steps, of which TensorFlow would keep every one ever traced.

    Optimizers sum gradients by an operation with a gradient of its own, which a global registry
    holds, and with it the graph that it was traced in. What is traced already needs it no more.
    """
    registered = tf_ops.gradient_registry._registry
    for name in [name for name in registered if name.startswith("CustomGradient-")]:
        graph = _traced_in(registered[name]["type"])
        if getattr(graph, "name", None) == "one_step_on_data":  # Keras's name for a train step
            del registered[name]


def _traced_in(function: Any) -> Any:
    """The graph of the first tensor that a function, or one it closes over, holds on to."""
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a cell that is still empty
            for item in tf.nest.flatten(cell.cell_contents):
                graph = getattr(item, "graph", None) or _traced_in(item)
                if graph is not None:
                    return graph
    return None


# TensorFlow wraps lists and dicts that are set as attributes while Keras does not track them (those
# of an optimizer that `compile` makes from its name), and its checkpoints refuse a wrapper whose
# contents were edited behind its back.


def is_wrapped_list(container: Any) -> bool:
    """Whether it is TensorFlow's list, which holds its elements a second time in an attribute."""
    return isinstance(container, ListWrapper)


def refill_dict(container: Any, contents: dict) -> None:
    """Replaces the contents of a dict, past overrides by which Keras's report to their trackers."""
    is_proxy = type(container) is _DictWrapper
    plain = container.__wrapped__ if is_proxy else container
    base = OrderedDict if isinstance(plain, OrderedDict) else dict
    base.clear(plain)
    base.update(plain, contents)
    if is_proxy:
        container._update_snapshot()  # the proxy takes the contents for its own doing


# New calls in the graph.


def put_calls_first(model: keras.Sequential) -> None:
    """Lets `input` and `output` of a Sequential model's layers mean the calls that it runs.

    `Sequential.add` calls all layers anew and leaves the calls of before where `layer.output` looks
    first: those would go past what is inserted.
    """
    graph: Any = graph_of(model)
    own = nodes_of(graph)
    for operation in graph.operations:
        calls = operation._inbound_nodes
        run = [call for call in own if call.operation is operation]
        calls[:] = [*run, *(call for call in calls if call not in run)]
        for index, call in enumerate(calls):
            for tensor in call.outputs:
                tensor._keras_history = tensor._keras_history._replace(node_index=index)
    _renew_graph(graph, graph._outputs_struct)


def splice(model: keras.Model, old: keras.KerasTensor, new: keras.KerasTensor) -> None:
    """Lets all calls of a model that read one symbolic tensor read another, and its outputs too.

    The calls and their outputs stay the same objects. Layers that became part of the model are
    tracked by it, in the order in which Keras would keep them had the model been made like that.

    Args:
      model: a built Functional or Sequential model.
      old: a tensor of the model's graph.
      new: a tensor made of tensors of the graph by new calls, which go on reading what they read.

    Raises:
      ValueError: the new graph is none: a cycle, a foreign input, or a name that stands twice.
    """
    graph: Any = graph_of(model)
    for node in nodes_of(graph):
        _read_instead(node, old, new)
    outputs = keras.tree.map_structure(lambda t: new if t is old else t, graph._outputs_struct)
    _renew_graph(graph, outputs)


def put_in_stack(
    model: keras.Sequential, after: keras.Layer, layers: Sequence[keras.Layer]
) -> None:
    """Puts layers behind another one in the list that a Sequential model builds itself from."""
    stack = list(model._layers)
    index = 1 + next(i for i, layer in enumerate(stack) if layer is after)
    model._layers = [*stack[:index], *layers, *stack[index:]]


def note_trainable_state(model: keras.Model) -> None:
    """Takes new layers for known since `compile`, so that Keras does not warn of them."""
    known = getattr(model, "_compiled_trainable_state", None)
    if known is not None:
        with DotNotTrackScope():  # as `compile` sets it
            model._compiled_trainable_state = {
                layer: known.get(layer, layer.trainable) for layer in model._flatten_layers()
            }


def _read_instead(node: Node, old: keras.KerasTensor, new: keras.KerasTensor) -> None:
    if not any(tensor is old for tensor in node.input_tensors):
        return
    _forget_reader(node)
    args, kwargs = node.arguments.convert(lambda x: new if x is old else x)
    node.arguments = type(node.arguments)(*args, **kwargs)
    for tensor in node.input_tensors:  # as Node.__init__ does
        tensor._keras_history.operation._outbound_nodes.append(node)


def _forget_reader(node: Node) -> None:
    for tensor in node.input_tensors:
        readers = tensor._keras_history.operation._outbound_nodes
        readers[:] = [reader for reader in readers if reader is not node]


def _renew_graph(graph: Functional, outputs: Any) -> None:
    """What Keras derives from a Functional model's inputs and outputs, derived anew."""
    flat = keras.tree.flatten(outputs)
    derived = map_graph(graph._inputs, flat)
    names = ("_nodes", "_nodes_by_depth", "_operations", "_operations_by_depth")
    with DotNotTrackScope():  # as Keras sets them
        for name, value in zip(names, derived, strict=True):
            setattr(graph, name, value)
    if any(now is not before for now, before in zip(flat, graph._outputs, strict=True)):
        vars(graph).update(_outputs_struct=outputs, _outputs=flat)  # TensorFlow would wrap lists
        graph.output_names = [tensor._keras_history.operation.name for tensor in flat]
    for layer in graph.layers:
        graph._tracker.track(layer)
    members = {id(layer) for layer in graph.layers}
    others = [layer for layer in graph._layers if id(layer) not in members]
    graph._layers[:] = [*graph.layers, *others]


def refit_optimizer(
    optimizer: keras.optimizers.Optimizer,
    weights: Sequence[keras.Variable],
    variables: Sequence[keras.Variable],
    slots: Mapping[str, Sequence[keras.Variable | None]],
) -> None:
    """Gives a built optimizer other weights to train, with their slots.

    Args:
      optimizer: the optimizer.
      weights: all that it is to train, in the order of the slots.
      variables: its own variables, in the order of files.
      slots: by attribute, the slot of every weight.
    """
    tracker = optimizer._tracker
    with DotNotTrackScope():  # as Keras sets them
        optimizer._variables = list(variables)
        optimizer._trainable_variables = list(weights)
    is_variable, _ = tracker.config["variables"]
    tracker.config["variables"] = (is_variable, optimizer._variables)
    tracker.stored_ids["variables"] = {id(variable) for variable in variables}
    for name, of_weights in slots.items():
        tracked = isinstance(getattr(optimizer, name), TrackedList)
        with contextlib.nullcontext() if tracked else DotNotTrackScope():
            setattr(optimizer, name, list(of_weights))
    keys = {optimizer._var_key(weight): index for index, weight in enumerate(weights)}
    refill_dict(optimizer._trainable_variables_indices, keys)


# Attributes.


def _set_attributes(change: LayerChange) -> None:
    layer = change.layer
    values = {name: _plain(value) for name, value in change.attributes.items()}
    for name, value in values.items():
        *owner, attribute = name.rsplit(".", 1)
        setattr(operator.attrgetter(*owner)(layer) if owner else layer, attribute, value)
    for name, shapes in change.build_shapes.items():
        operator.attrgetter(name)(layer)._build_shapes_dict = dict(shapes)
    # A layer without `get_config` is serialized by the arguments it was created with.
    config = getattr(layer, "_auto_config", None)
    if config is not None and config.config.keys() & values.keys():
        layer._auto_config = type(config)(
            **{name: values.get(name, value) for name, value in config.config.items()}
        )


def _plain(value: Any) -> Any:
    """NumPy numbers as Python's, because attributes go into JSON configs."""
    return value.item() if isinstance(value, np.generic) else value
