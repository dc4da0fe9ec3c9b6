"""convert: any stock model becomes growable; strip: its inverse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import keras

from tfgrow.graph.nodes import functional_of, trace
from tfgrow.layers import registry
from tfgrow.layers.growable import Growable, from_stock, to_stock


def convert(model: keras.Model) -> keras.Model:
    """Makes a stock model growable: same weights, same outputs.

    Dense, convolutions, BatchNormalization and the other layers that tfgrow can widen are replaced
    by their growable twins from `tfgrow.layers`; all others stay what they are. Nested Functional
    and Sequential models are inlined. A compiled model stays compiled, with its optimizer's state.

    Args:
      model: a built Functional or Sequential model. It is left untouched.

    Returns:
      A new model.

    Raises:
      ValueError: if a Sequential model isn't built.
      TypeError: if the model, or one nested in it, is subclassed.

    Example:

    >>> import keras, tfgrow
    >>> stock = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="hidden")])
    >>> type(tfgrow.convert(stock).layers[0]).__module__
    'tfgrow.layers.dense'
    """

    def growable(layer):
        twin = registry.growable_class(layer)
        return _copy(layer) if twin is None else from_stock(twin, layer)

    return rebuild_with(model, growable)


def strip(model: keras.Model) -> keras.Model:
    """Turns a growable model into one of stock Keras layers: same weights, same outputs.

    The result saves to a file that loads where tfgrow isn't installed. A compiled model stays
    compiled, with its optimizer's state.

    Args:
      model: a built Functional or Sequential model. It is left untouched.

    Returns:
      A new model.

    Example:

    >>> import keras, tfgrow
    >>> stock = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="hidden")])
    >>> type(tfgrow.strip(tfgrow.convert(stock)).layers[0]) is keras.layers.Dense
    True
    """

    def stock(layer):
        known = isinstance(layer, Growable) and layer.stock_class is not None
        return to_stock(layer) if known else _copy(layer)

    return rebuild_with(model, stock)


def copy_model(model: keras.Model) -> keras.Model:
    """A model of the same layer classes, with its own copies of the weights and optimizer state."""
    return rebuild_with(model, _copy)


def rebuild_with(model: keras.Model, replace: Callable) -> keras.Model:
    """A copy of a model whose layers went through `replace`, nested models inlined."""
    functional_of(model)  # raises for what has no graph
    twins: dict[int, tuple] = {}
    names = _layer_names(model)
    rename = {name for name, count in Counter(names).items() if count > 1}

    def twin_of(layer, prefix=""):
        if id(layer) not in twins:
            twin = replace(layer)
            if prefix and layer.name in rename:
                config = {**twin.get_config(), "name": f"{prefix}_{layer.name}"}
                twin = type(twin).from_config(config)
            twins[id(layer)] = (layer, twin)
        return twins[id(layer)][1]

    if isinstance(model, keras.Sequential) and not _nested(model):
        copy = keras.models.clone_model(model, clone_function=twin_of)
    else:
        copy = _rebuild_functional(model, twin_of)
    for old, new in twins.values():
        _copy_variables(old, new)
    _copy_training_state(model, copy, twins)
    return copy


def _copy(layer):
    return layer.__class__.from_config(layer.get_config())


def _nested(model) -> list:
    return [layer for layer in model.layers if isinstance(layer, keras.Model)]


def _layer_names(model) -> list[str]:
    names = []
    for layer in model.layers:
        inner = isinstance(layer, keras.Model)
        names += _layer_names(layer) if inner else [layer.name]
    return names


def _rebuild_functional(model, twin_of):
    functional = functional_of(model)

    def keep_nested(operation):
        is_layer = isinstance(operation, keras.layers.Layer)
        return twin_of(operation) if is_layer and not isinstance(operation, keras.Model) else operation

    def call(operation, *args, **kwargs):
        if isinstance(operation, keras.Model):
            return _inline(operation, twin_of, args, kwargs)
        return operation(*args, **kwargs)

    copy = keras.models.clone_model(functional, clone_function=keep_nested, call_function=call)
    copy.name = model.name
    if not copy.compiled and model.compiled:
        copy.compile_from_config(model.get_compile_config())
    return copy


def _inline(nested, twin_of, args, kwargs):
    """Calls the twins of a nested model's layers one by one."""
    if len(args) != 1:
        raise TypeError(
            f"Nested model '{nested.name}' is called with {len(args)} positional arguments; "
            "expected one (a tensor, list or dict of tensors)."
        )
    graph = trace(nested)
    values = dict(zip(graph.inputs, keras.tree.flatten(args[0]), strict=True))
    for node in graph.nodes:
        operation = node.operation
        node_args, node_kwargs = node.arguments(values)
        if isinstance(operation, keras.Model):
            result = _inline(operation, twin_of, node_args, node_kwargs)
        else:
            is_layer = isinstance(operation, keras.layers.Layer)
            twin = twin_of(operation, prefix=nested.name) if is_layer else operation
            result = twin(*node_args, **node_kwargs)
        values.update(zip(node.outputs, keras.tree.flatten(result), strict=True))
    outputs = [values[tensor] for tensor in graph.outputs]
    structure = functional_of(nested).output
    return keras.tree.pack_sequence_as(structure, outputs)


def _copy_variables(old, new) -> None:
    if len(old.variables) != len(new.variables):
        raise ValueError(
            f"Layer '{old.name}' ({type(old).__name__}) has {len(old.variables)} variables, but a "
            f"copy made from its config has {len(new.variables)}; its get_config() and build() "
            "must describe all of them."
        )
    for source, target in zip(old.variables, new.variables, strict=True):
        target.assign(source)


def _copy_training_state(model, copy, twins) -> None:
    """Carries a built optimizer's state over, variable by variable."""
    if not model.compiled or not getattr(model.optimizer, "built", False):
        return
    partner = {}
    for old, new in twins.values():
        partner.update({id(a): b for a, b in zip(old.variables, new.variables, strict=True)})
    mapped = [partner.get(id(variable)) for variable in model.trainable_variables]
    copy.optimizer.build(copy.trainable_variables)
    if [id(v) for v in mapped] != [id(v) for v in copy.trainable_variables]:
        return  # inlining changed the order, by which an optimizer knows its slots
    pairs = zip(model.optimizer.variables, copy.optimizer.variables, strict=True)
    for source, target in pairs:
        target.assign(source)
