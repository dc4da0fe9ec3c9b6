"""convert: any stock model becomes growable; strip: its inverse."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import keras

from tfgrow._keras import (
    SET_BY_TRAINING,
    compile_arguments,
    layers_within,
    optimizer_weights,
    trusting_configs,
)
from tfgrow.graph.nodes import functional_of, trace
from tfgrow.graph.ties import ties_within
from tfgrow.layers import registry
from tfgrow.layers.expansions import expansion
from tfgrow.layers.growable import from_stock, live_config, to_stock


def convert(model: keras.Model) -> keras.Model:
    """Makes a stock model growable: same weights, same outputs.

    Dense, convolutions, BatchNormalization and the other layers that tfgrow can widen are replaced
    by their growable twins from `tfgrow.layers`; all others stay what they are. Nested Functional
    and Sequential models are inlined, separable convolutions become a depthwise one
    (`<name>_depthwise`) and a 1x1 one, `TimeDistributed(Dense)` becomes its Dense layer. A compiled
    model stays compiled, with its optimizer's state.

    Args:
      model: a built Functional or Sequential model. It is left untouched.

    Returns:
      A new model.

    Raises:
      ValueError: if a Sequential model isn't built, or layers have weights in common.
      TypeError: if the model, or one nested in it, is subclassed.

    Example:

    >>> import keras, tfgrow
    >>> stock = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="hidden")])
    >>> type(tfgrow.convert(stock).layers[0]).__module__
    'tfgrow.layers.dense'
    """

    def growable(layer):
        pieces = expansion(layer)
        if pieces is not None:
            return [growable(piece) for piece in pieces]
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
        return to_stock(layer) if registry.is_ours(layer) else _copy(layer)

    return rebuild_with(model, stock)


def copy_model(model: keras.Model, compiled: bool = True) -> keras.Model:
    """A model of the same layer classes, with its own copies of the weights.

    Args:
      model: a built Functional or Sequential model.
      compiled: whether the copy of a compiled model is compiled too, with the optimizer's state.
    """
    return rebuild_with(model, _copy, compiled)


def rebuild_with(model: keras.Model, replace: Callable, compiled: bool = True) -> keras.Model:
    """A copy of a model whose layers went through `replace`, nested models inlined.

    Where `replace` gives a list, its layers are called one after the other.
    """
    functional = functional_of(model)  # raises for what has no graph
    check_ties(model)
    twins = _Twins(model, replace)
    if isinstance(model, keras.Sequential) and not _nested(model):
        first = twins.input(functional, model.inputs[0])
        layers = [first, *(piece for layer in model.layers for piece in twins.layers_of(layer))]
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


class _Chain:
    """Several layers in the place of one."""

    def __init__(self, layers: list[keras.Layer]):
        self.layers = layers

    @property
    def variables(self) -> list[keras.Variable]:
        return [variable for layer in self.layers for variable in layer.variables]

    def __call__(self, *args, **kwargs):
        first, *others = self.layers
        taken = inspect.signature(first.call).parameters
        outputs = first(*args, **{name: kwargs[name] for name in kwargs if name in taken})
        for layer in others:
            outputs = layer(outputs)
        return outputs


class _Twins:
    """The new layer of every old one, each made once."""

    def __init__(self, model: keras.Model, replace: Callable):
        self._replace = replace
        self._pairs: dict[int, tuple] = {}
        self._operations: dict[int, Any] = {}
        counts = Counter(_names(model))
        self._ambiguous = {name for name, count in counts.items() if count > 1}
        self._taken = set(counts)

    def of(self, layer, prefix: str = ""):
        """The twin of a layer; inside a nested model, `prefix` tells apart what is named alike."""
        if id(layer) not in self._pairs:
            twin = _from_config(self._replace, layer)
            if isinstance(twin, list):
                twin = _Chain([self._renamed(piece, layer, prefix) for piece in twin])
            else:
                twin = self._renamed(twin, layer, prefix)
            self._pairs[id(layer)] = (layer, twin)
        return self._pairs[id(layer)][1]

    def layers_of(self, layer) -> list[keras.Layer]:
        """The layer, or the several, in the place of one."""
        twin = self.of(layer)
        return twin.layers if isinstance(twin, _Chain) else [twin]

    def _renamed(self, twin, layer, prefix: str):
        """A twin by a name that no other has."""
        if twin.name == layer.name and not (prefix and layer.name in self._ambiguous):
            return twin
        if twin.name != layer.name and twin.name not in self._taken:
            self._taken.add(twin.name)
            return twin
        return _from_config(_copy, twin, name=self._free_name(twin, prefix))

    def operation(self, operation, prefix: str):
        """A copy of a Keras operation, by another name where its own would stand twice.

        Operations tell by their calls what else they read: each must be called in one model only.
        """
        renamed = prefix and operation.name in self._ambiguous
        if id(operation) not in self._operations:
            name = {"name": self._free_name(operation, prefix)} if renamed else {}
            self._operations[id(operation)] = operation
            with contextlib.nullcontext() if renamed else contextlib.suppress(ValueError):
                # One made with arrays has no config; it can't grow either, and stays as it is.
                self._operations[id(operation)] = _from_config(_copy, operation, **name)
        return self._operations[id(operation)]

    def _free_name(self, operation, prefix: str) -> str:
        wanted = "_".join(filter(None, (prefix, operation.name)))
        choices = itertools.chain([wanted], (f"{wanted}_{n}" for n in itertools.count(1)))
        name = next(choice for choice in choices if choice not in self._taken)
        self._taken.add(name)
        return name

    def input(self, functional, tensor):
        """The output of the twin of the input layer that makes a model's input."""
        layers = (x for x in functional.layers if isinstance(x, keras.layers.InputLayer))
        return self.of(next(layer for layer in layers if layer.output is tensor)).output

    def pairs(self) -> list[tuple]:
        """Every old layer with its twin."""
        return list(self._pairs.values())


def _copy(layer, **changes):
    return layer.__class__.from_config({**live_config(layer), **changes})


def _from_config(make: Callable, layer, **changes):
    """A layer made from another's config, in which the user's own functions may occur."""
    try:
        # What the config holds comes from a live layer, not from a file: its code may be trusted.
        with keras.saving.custom_object_scope(_own_objects(layer)), trusting_configs():
            twin = make(layer, **changes)
    except Exception as error:
        raise ValueError(
            f"Layer '{layer.name}' ({type(layer).__name__}) can't be made anew from its config: "
            "give it a get_config() and from_config() that describe it. "
            f"{type(error).__name__}: {str(error)[:500]}"
        ) from error
    if isinstance(layer, keras.layers.Lambda):
        twin.function = layer.function  # the config of a lambda is byte code without its globals
    return twin


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
    if not own:
        try:
            return kind(*args, **kwargs)
        except TypeError:
            return plain(*args, **kwargs)
    as_plain = plain(*args, **kwargs)
    try:
        copy = kind(*args, **kwargs, **_own_arguments(model, as_plain))
    except TypeError as error:
        raise TypeError(
            f"Model '{model.name}' is a {kind.__name__} with its own {', '.join(own)}, which "
            "a copy must keep, but its __init__ doesn't take what keras.Model's does and what its "
            f"get_config() names ({error}). Let it accept (inputs, outputs, name)."
        ) from error
    _check_own_attributes(model, copy, as_plain)
    return copy


def _own_arguments(model, plain) -> dict:
    """What a model's config holds beyond that of a plain model: arguments of its class's own."""
    if type(model).get_config in (keras.Model.get_config, type(plain).get_config):
        return {}
    with contextlib.suppress(NotImplementedError):
        config = model.get_config()
        return {name: config[name] for name in set(config) - set(plain.get_config()) - _OF_MODELS}
    return {}


_OF_MODELS = {"layers", "input_layers", "output_layers", "build_input_shape", "trainable", "dtype"}


def _check_own_attributes(model, copy, plain) -> None:
    """Refuses a copy that trains by other settings than its model, and says what else it lacks."""
    own = vars(model).keys() - vars(plain).keys() - SET_BY_TRAINING
    lost = [
        name
        for name in sorted(own)
        if isinstance(value := vars(model)[name], _SETTINGS) and vars(copy).get(name, copy) != value
    ]
    if lost:
        raise TypeError(
            f"Model '{model.name}' is a {type(model).__name__} whose attributes {lost} a copy "
            "would not have: they are arguments of its __init__ that its get_config() does not "
            "name. Let get_config() return them."
        )
    missing = sorted(own - vars(copy).keys() - set(lost))
    if missing:
        warnings.warn(
            f"Model '{model.name}' is a {type(model).__name__} whose attributes {missing} are "
            "neither arguments of its __init__ nor made there: the copy has none. Set them on it.",
            stacklevel=2,
        )


_SETTINGS = (bool, int, float, str, type(None))

_TRAINING = ("train_step", "test_step", "predict_step", "compute_loss", "compile")


def _nested(model) -> list:
    return [layer for layer in model.layers if isinstance(layer, keras.Model)]


def _names(model) -> list[str]:
    """Names of all layers and operations of a model and of those nested in it, one per use."""
    names = []
    for operation in functional_of(model).operations:
        inner = isinstance(operation, keras.Model)
        names += _names(operation) if inner else [operation.name]
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
            inner = "_".join(filter(None, (prefix, operation.name)))
            result = _call(operation, twins, args[0], inner)
        elif isinstance(operation, keras.layers.Layer):
            result = twins.of(operation, prefix)(*args, **kwargs)
        else:
            result = twins.operation(operation, prefix)(*args, **kwargs)
        values.update(zip(node.outputs, keras.tree.flatten(result), strict=True))
    outputs = [values[tensor] for tensor in graph.outputs]
    return keras.tree.pack_sequence_as(functional_of(model).output, outputs)


def check_ties(model) -> None:
    """Refuses weights that several layers have in common: layers made anew would have their own."""
    tie = next(iter(ties_within(model).values()), None)
    if tie is not None:
        raise ValueError(
            f"Model '{model.name}': {tie}, and layers made anew would each have their own: "
            "convert, strip and copies (measure_change without in_place=True) can't keep that. "
            "Built of layers of tfgrow.layers the model grows in place, all but the widths that "
            "the two share, and save() keeps what they share."
        )


def _copy_variables(old, new) -> None:
    if len(old.variables) != len(new.variables):
        raise ValueError(
            f"Layer '{old.name}' ({type(old).__name__}) has {len(old.variables)} variables, but a "
            f"copy made from its config has {len(new.variables)}; its get_config() and build() "
            "must describe all of them."
        )
    for source, target in zip(old.variables, new.variables, strict=True):
        target.assign(source)
    if isinstance(new, _Chain):
        return
    for inner_old, inner_new in zip(layers_within(old), layers_within(new), strict=True):
        _copy_own_state(inner_old, inner_new)


def _copy_own_state(old, new) -> None:
    """What a layer saves and loads in ways of its own: adapted statistics, vocabularies."""
    if type(old).load_own_variables is not keras.Layer.load_own_variables:
        store: dict = {}
        old.save_own_variables(store)
        new.load_own_variables(store)
    if hasattr(old, "save_assets") and hasattr(new, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)


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
    # Not `model.trainable_variables`: a layer may have been frozen since the optimizer was built.
    in_old_order = [partner[id(variable)] for variable in optimizer_weights(model.optimizer)]
    known = {id(variable) for variable in in_old_order}
    in_new_order = [variable for variable in copy.trainable_variables if id(variable) in known]
    if len(in_new_order) != len(in_old_order):
        in_new_order = in_old_order
    copy.optimizer.build(in_new_order)
    slots = copy.optimizer.variables
    if [id(v) for v in in_old_order] != [id(v) for v in in_new_order]:
        # Inlining changed the order of the weights, by which optimizers keep their slots; an
        # optimizer built in the old order tells by the slots' names where each has gone.
        guide = type(copy.optimizer).from_config(copy.optimizer.get_config())
        guide.build(in_old_order)
        by_path = {variable.path: variable for variable in slots}
        slots = [by_path[variable.path] for variable in guide.variables]
    for source, target in zip(model.optimizer.variables, slots, strict=True):
        target.assign(source)
