"""convert: any stock model becomes growable; strip: its inverse."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable

import keras

from tfgrow._keras import compile_arguments
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


def copy_model(model: keras.Model, compiled: bool = True) -> keras.Model:
    """A model of the same layer classes, with its own copies of the weights.

    Args:
      model: a built Functional or Sequential model.
      compiled: whether the copy of a compiled model is compiled too, with the optimizer's state.
    """
    return rebuild_with(model, _copy, compiled)


def rebuild_with(model: keras.Model, replace: Callable, compiled: bool = True) -> keras.Model:
    """A copy of a model whose layers went through `replace`, nested models inlined."""
    functional = functional_of(model)  # raises for what has no graph
    twins = _Twins(model, replace)
    if isinstance(model, keras.Sequential) and not _nested(model):
        first = twins.input(functional, model.inputs[0])
        layers = [first, *(twins.of(layer) for layer in model.layers)]
        copy = _same_class(model, layers, name=model.name)
    else:
        inputs = keras.tree.map_structure(lambda t: twins.input(functional, t), functional.input)
        copy = _same_class(model, inputs, _call(model, twins, inputs), name=model.name)
    copy.dtype_policy = model.dtype_policy
    if not model.trainable:
        copy.trainable = False
    for old, new in twins.pairs():
        _copy_variables(old, new)
    if compiled and model.compiled:
        _compile_alike(model, copy)
        _copy_optimizer_state(model, copy, twins.pairs())
    return copy


class _Twins:
    """The new layer of every old one, each made once."""

    def __init__(self, model: keras.Model, replace: Callable):
        self._replace = replace
        self._pairs: dict[int, tuple] = {}
        counts = Counter(_layer_names(model))
        self._ambiguous = {name for name, count in counts.items() if count > 1}

    def of(self, layer, prefix: str = ""):
        """The twin of a layer; inside a nested model, `prefix` tells apart what is named alike."""
        if id(layer) not in self._pairs:
            twin = _from_config(self._replace, layer)
            if prefix and layer.name in self._ambiguous:
                name = f"{prefix}_{layer.name}"
                twin = _from_config(_copy, twin, name=name)
            self._pairs[id(layer)] = (layer, twin)
        return self._pairs[id(layer)][1]

    def input(self, functional, tensor):
        """The output of the twin of the input layer that makes a model's input."""
        layers = (x for x in functional.layers if isinstance(x, keras.layers.InputLayer))
        return self.of(next(layer for layer in layers if layer.output is tensor)).output

    def pairs(self) -> list[tuple]:
        """Every old layer with its twin."""
        return list(self._pairs.values())


def _copy(layer, **changes):
    return layer.__class__.from_config({**layer.get_config(), **changes})


def _from_config(make: Callable, layer, **changes):
    """A layer made from another's config, in which the user's own functions may occur."""
    try:
        with keras.saving.custom_object_scope(_own_objects(layer)):
            return make(layer, **changes)
    except Exception as error:
        raise ValueError(
            f"Layer '{layer.name}' ({type(layer).__name__}) can't be made anew from its config: "
            f"{error} Give it a get_config() and from_config() that describe it; a lambda has no "
            "config, a named function has."
        ) from error


def _own_objects(layer) -> dict:
    """Functions and classes that a layer's config may name, registered with Keras or not."""
    found: dict = {}
    for value in vars(layer).values():
        if inspect.isfunction(value):
            found[value.__name__] = value
        elif isinstance(value, _BY_NAME):
            found[type(value).__name__] = type(value)
    return found


_BY_NAME = (keras.initializers.Initializer, keras.regularizers.Regularizer,
            keras.constraints.Constraint)  # fmt: skip


def _same_class(model, *args, **kwargs):
    """A model made by the class of another, or a plain one where that is as good."""
    kind = type(model)
    own = [name for name in _TRAINING if getattr(kind, name) is not getattr(keras.Model, name)]
    plain = keras.Sequential if len(args) == 1 else keras.Model
    if isinstance(model, keras.Sequential) and plain is keras.Model:
        kind = keras.Model  # its nested models are inlined
    try:
        return kind(*args, **kwargs)
    except TypeError as error:
        if own:
            raise TypeError(
                f"Model '{model.name}' is a {kind.__name__} with its own {', '.join(own)}, which "
                "a copy must keep, but its __init__ doesn't take what keras.Model's does "
                f"({error}). Let it accept (inputs, outputs, name)."
            ) from error
        return plain(*args, **kwargs)


_TRAINING = ("train_step", "test_step", "predict_step", "compute_loss", "compile")


def _nested(model) -> list:
    return [layer for layer in model.layers if isinstance(layer, keras.Model)]


def _layer_names(model) -> list[str]:
    names = []
    for layer in model.layers:
        inner = isinstance(layer, keras.Model)
        names += _layer_names(layer) if inner else [layer.name]
    return names


def _call(model, twins: _Twins, inputs, prefix: str = ""):
    """Calls the twins of a model's layers one by one, those of nested models too."""
    graph = trace(model)
    values = dict(zip(graph.inputs, keras.tree.flatten(inputs), strict=True))
    for node in graph.nodes:
        operation = node.operation
        args, kwargs = node.arguments(values)
        if isinstance(operation, keras.Model):
            if len(args) != 1:
                raise TypeError(
                    f"Nested model '{operation.name}' is called with {len(args)} positional "
                    "arguments; expected one (a tensor, list or dict of tensors)."
                )
            result = _call(operation, twins, args[0], operation.name)
        elif isinstance(operation, keras.layers.Layer):
            result = twins.of(operation, prefix)(*args, **kwargs)
        else:
            result = operation(*args, **kwargs)
        values.update(zip(node.outputs, keras.tree.flatten(result), strict=True))
    outputs = [values[tensor] for tensor in graph.outputs]
    return keras.tree.pack_sequence_as(functional_of(model).output, outputs)


def _copy_variables(old, new) -> None:
    if len(old.variables) != len(new.variables):
        raise ValueError(
            f"Layer '{old.name}' ({type(old).__name__}) has {len(old.variables)} variables, but a "
            f"copy made from its config has {len(new.variables)}; its get_config() and build() "
            "must describe all of them."
        )
    for source, target in zip(old.variables, new.variables, strict=True):
        target.assign(source)


def _compile_alike(model, copy) -> None:
    """Compiles with the live arguments: a config could not name the user's own functions."""
    arguments = compile_arguments(model)
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(_fresh_metric, arguments[name])
    optimizer = model.optimizer
    if optimizer is not None:
        arguments["optimizer"] = type(optimizer).from_config(optimizer.get_config())
    copy.compile(**arguments)


def _fresh_metric(metric):
    if not isinstance(metric, keras.Metric):
        return metric
    with keras.saving.custom_object_scope(_own_objects(metric)):
        return type(metric).from_config(metric.get_config())


def _copy_optimizer_state(model, copy, pairs) -> None:
    """Carries a built optimizer's state over, variable by variable."""
    if not getattr(model.optimizer, "built", False):
        return
    partner = {
        id(a): b for old, new in pairs for a, b in zip(old.variables, new.variables, strict=True)
    }
    in_old_order = [partner[id(variable)] for variable in model.trainable_variables]
    copy.optimizer.build(copy.trainable_variables)
    slots = copy.optimizer.variables
    if [id(v) for v in in_old_order] != [id(v) for v in copy.trainable_variables]:
        # Inlining changed the order of the weights, by which optimizers keep their slots; an
        # optimizer built in the old order tells by the slots' names where each has gone.
        guide = type(copy.optimizer).from_config(copy.optimizer.get_config())
        guide.build(in_old_order)
        by_path = {variable.path: variable for variable in slots}
        slots = [by_path[variable.path] for variable in guide.variables]
    for source, target in zip(model.optimizer.variables, slots, strict=True):
        target.assign(source)
