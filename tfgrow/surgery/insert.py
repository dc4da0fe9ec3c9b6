"""New layers in a live model: every call that read a tensor reads what new layers make of it.

The model, its old layers, their calls and their variables stay the same objects. The calls that
read the tensor get other arguments, and what Keras derives from the graph is derived anew.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tfgrow._keras import called_by_others, calls_behind, compile_arguments
from tfgrow.graph import versions
from tfgrow.graph.nodes import Graph, functional_of, trace
from tfgrow.surgery import optimizer, rebuild
from tfgrow.surgery.transaction import growth_transaction

Build = Callable[[keras.KerasTensor], keras.KerasTensor]


def insert_after(model: keras.Model, layer: Any, build: Build) -> list[keras.Operation]:
    """Inserts new layers after a layer, in place, inside or outside `fit`.

    All that read the layer's output take what `build` makes of it instead, and so do the model's
    outputs if it is one of them. The optimizer goes on with the slots it has; those of new weights
    are neutral. All or nothing: on any error model and optimizer are as before. Other models that
    were made of the same symbolic tensors (feature extractors) have to be made anew.

    Args:
      model: a built Functional or Sequential model, compiled or not, without nested models.
      layer: a layer of the model that is called once, or its name.
      build: makes a tensor of the same shape and dtype from the layer's symbolic output, by layers
        that are not in the model yet. What it makes without a `dtype` follows the layer's policy.

    Returns:
      What was inserted, producers before consumers.

    Raises:
      TypeError: the model is subclassed.
      ValueError: there is no such place, or what `build` makes does not fit it.

    Example:

    >>> import keras
    >>> from tfgrow.surgery.insert import insert_after
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a"),
    ...     keras.layers.Dense(2, name="b")])
    >>> _ = insert_after(model, "a", keras.layers.Dense(3, name="new"))
    >>> [layer.name for layer in model.layers], model.count_params()
    (['a', 'new', 'b'], 35)
    """
    place = Place(model, layer)
    return _splice(place, lambda: build(place.tensor))


def add_branch(model: keras.Model, source: Any, target: Any, build: Build) -> list[keras.Operation]:
    """Adds a branch between two layers: the target's output becomes itself plus what `build` makes.

    Args:
      model: as in `insert_after`, but a branch cannot be expressed in a Sequential model.
      source: the layer whose output the branch reads, or its name; not downstream of `target`, but
        it may be `target` itself.
      target: the layer to whose output the branch is added, or its name.
      build: makes a tensor of the shape and dtype of the target's output from the source's.

    Returns:
      What was inserted, producers before consumers; the addition, `skip_<target>`, comes last.

    Example:

    >>> import keras
    >>> from tfgrow.surgery.insert import add_branch
    >>> inputs = keras.Input((4,))
    >>> hidden = keras.layers.Dense(3, name="a")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(2, name="b")(hidden))
    >>> new = add_branch(model, "a", "b", keras.layers.Dense(2, kernel_initializer="zeros"))
    >>> [layer.name for layer in new]
    ['dense', 'skip_b']
    """
    if isinstance(model, keras.Sequential):
        raise ValueError(_no_branches(model))
    start, end = Place(model, source), Place(model, target)
    if start.operation is not end.operation and end.operation in start.upstream():
        raise ValueError(
            f"Layer '{start.operation.name}' lies downstream of '{end.operation.name}': a branch "
            "from it back would make a cycle. Swap source and target."
        )

    def joined() -> keras.KerasTensor:
        made = build(start.tensor)
        _check_fits(made, end)
        join = keras.layers.Add(name=free_name(model, f"skip_{end.operation.name}"))
        return join([end.tensor, made])

    return _splice(end, joined)


def free_name(model: keras.Model, wanted: str) -> str:
    """The wanted name, with a number if a layer of the model has it already."""
    taken = {operation.name for operation in functional_of(model).operations}
    choices = itertools.chain([wanted], (f"{wanted}_{n}" for n in itertools.count(1)))
    return next(choice for choice in choices if choice not in taken)


class Place:
    """The one symbolic output of a layer of a model.

    Attributes:
      model: the model.
      graph: its graph.
      operation: the layer.
      tensor: the symbolic output.

    Raises:
      TypeError, ValueError: there is no such place in the model; says why.
    """

    def __init__(self, model: keras.Model, layer: Any):
        self.model = model
        self.graph = trace(model)
        _check_whole(model)
        self.operation = _operation_of(model, layer)
        self.tensor = _output_of(model, self.graph, self.operation)

    @property
    def is_output(self) -> bool:
        """Whether it is one of the model's outputs."""
        return any(self.graph.tensors[tensor] is self.tensor for tensor in self.graph.outputs)

    def upstream(self) -> list[keras.Operation]:
        """The operations that the layer's output depends on."""
        return [call.operation for call in calls_behind(self.tensor, set())]


def _splice(place: Place, make: Callable[[], keras.KerasTensor]) -> list[keras.Operation]:
    model = place.model
    optimizer.check_optimizer(model)
    _check_named_outputs(place)
    trained = {id(variable) for variable in model.trainable_variables}
    with growth_transaction(model):
        if isinstance(model, keras.Sequential):
            rebuild.put_calls_first(model)
        with model.distribute_strategy.scope(), _policy(place):
            new = make()
        _check_fits(new, place)
        calls = calls_behind(new, {id(tensor) for tensor in place.graph.tensors.values()})
        _check_calls(calls, place)
        rebuild.splice(model, place.tensor, new)
        operations = [call.operation for call in calls]
        if isinstance(model, keras.Sequential):
            rebuild.put_in_stack(model, place.operation, operations)
        rebuild.note_trainable_state(model)
        newborn = [v for v in model.trainable_variables if id(v) not in trained]
        optimizer.extend_optimizer(model, newborn)
        rebuild.renew_functions(model)
        versions.advance(model)
    return operations


@contextlib.contextmanager
def _policy(place: Place) -> Iterator[None]:
    """New layers follow the dtype policy of the layer they come after, not that of the session."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(getattr(place.operation, "dtype_policy", before))
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


# Checks.


def _check_whole(model: keras.Model) -> None:
    if called_by_others(model):
        raise ValueError(
            f"Model '{model.name}' is part of another model, which called it. Insert layers into "
            "that one: tfgrow.convert(the whole model) inlines this one."
        )
    for operation in functional_of(model).operations:
        if isinstance(operation, keras.Model):
            raise ValueError(
                f"Model '{model.name}' holds the nested model '{operation.name}'. Layers are "
                "inserted into flat models: tfgrow.convert(model) inlines nested ones."
            )


def _operation_of(model: keras.Model, layer: Any) -> keras.Operation:
    operations = functional_of(model).operations
    found = [item for item in operations if item is layer or item.name == layer]
    if not found:
        raise ValueError(
            f"Model '{model.name}' has no layer {getattr(layer, 'name', layer)!r}. It has "
            f"{[operation.name for operation in operations]}."
        )
    return found[0]


def _output_of(model: keras.Model, graph: Graph, operation) -> keras.KerasTensor:
    if isinstance(operation, keras.layers.InputLayer):
        return operation.output
    calls = graph.calls(operation)
    if len(calls) > 1:
        raise ValueError(
            f"Layer '{operation.name}' is called {len(calls)} times in model '{model.name}', so "
            "that its output is not one place. Insert after a layer that is called once."
        )
    if len(calls[0].outputs) > 1:
        raise ValueError(
            f"Layer '{operation.name}' has {len(calls[0].outputs)} outputs. Insert after a layer "
            "that has one."
        )
    return graph.tensors[calls[0].outputs[0]]


def _check_fits(made: Any, place: Place) -> None:
    old = place.tensor
    if not isinstance(made, keras.KerasTensor):
        raise TypeError(f"build must return one symbolic tensor. Found: {made!r}")
    if (tuple(made.shape), made.dtype) != (tuple(old.shape), old.dtype):
        raise ValueError(
            f"What build makes has shape {tuple(made.shape)} and dtype {made.dtype}, the output of "
            f"layer '{place.operation.name}' {tuple(old.shape)} and {old.dtype}. They must agree."
        )


def _check_calls(calls: list, place: Place) -> None:
    """The new calls are made by new layers of new names, of tensors of the model alone."""
    model = place.model
    if not calls:
        raise ValueError("build must apply at least one new layer. It returned a tensor it found.")
    names = {operation.name for operation in functional_of(model).operations}
    own = {id(operation) for operation in functional_of(model).operations}
    for call in calls:
        name = call.operation.name
        if call.is_input:
            raise ValueError(f"build reads '{name}', which is not part of model '{model.name}'.")
        if id(call.operation) in own:
            raise ValueError(f"build calls layer '{name}', which the model has. Make a new one.")
        if name in names:
            raise ValueError(
                f"Model '{model.name}' would have two layers named '{name}'. Give the new layer "
                "another name: tfgrow.surgery.insert.free_name(model, name)."
            )
        if isinstance(call.operation, keras.Model):
            raise ValueError(f"build calls the model '{name}'. Call its layers one by one.")
        names.add(name)
    if isinstance(model, keras.Sequential):
        _check_chain(calls, place)


def _check_chain(calls: list, place: Place) -> None:
    tensor = place.tensor
    for call in calls:
        chained = len(call.input_tensors) == 1 and call.input_tensors[0] is tensor
        if not chained or not isinstance(call.operation, keras.layers.Layer):
            raise ValueError(_no_branches(place.model))
        tensor = call.outputs[0]


def _no_branches(model: keras.Sequential) -> str:
    return (
        f"Sequential model '{model.name}' can hold a chain of layers, no branch. Make it a "
        "functional one, which shares its layers: keras.Model(model.inputs, model.outputs), and "
        "compile that."
    )


def _check_named_outputs(place: Place) -> None:
    """Losses and metrics by the name of an output layer would not be found when it changes."""
    named = isinstance(functional_of(place.model).output, dict)  # by keys of their own
    if named or not (place.is_output and place.model.compiled):
        return
    name = place.operation.name
    for argument, value in compile_arguments(place.model).items():
        if isinstance(value, dict) and name in value:
            raise ValueError(
                f"compile was given {argument} for the output named '{name}', which would come "
                "from another layer now. Compile with a list, in the order of the outputs, first."
            )
