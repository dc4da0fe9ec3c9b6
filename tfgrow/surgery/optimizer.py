"""What an optimizer remembers of each weight, carried over to the weight's new shape.

Every slot array follows its weight's `AxisSource`s, axis by axis: an entry inherits its source's,
scaled as its kind of slot scales with the gradient, and a newborn entry starts neutral. Weights,
slots, iterations, learning rate, loss scale and the optimizer itself stay the same objects.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tfgrow._keras import optimizer_weights, own_variables
from tfgrow.surgery import rebuild
from tfgrow.types import NEWBORN, AxisSource


class SlotKind(enum.Enum):
    """How a slot scales when the gradient of its weight is multiplied by s, and how it is born.

    Newborns of squares and magnitudes get the mean over the inherited entries of their axis: at
    zero they would make the first steps of a newborn many times too long.
    """

    GRADIENT = "gradient"  # x s; newborn 0
    SQUARED_GRADIENT = "squared_gradient"  # x s^2; newborn the mean
    MAGNITUDE = "magnitude"  # x |s|; newborn the mean
    SQUARED_STEP = "squared_step"  # steps already divided by the gradient's size: x 1; the mean
    WEIGHT = "weight"  # an average of weights: its distance to the weight follows value_scale
    MEAN_OVER_LAST = "mean_over_last"  # of squared gradients over the weight's last axis
    MEAN_OVER_SECOND_LAST = "mean_over_second_last"  # over the last but one


_AVERAGED = {SlotKind.MEAN_OVER_LAST: -1, SlotKind.MEAN_OVER_SECOND_LAST: -2}
_EXPONENT = {
    SlotKind.SQUARED_GRADIENT: 2,
    SlotKind.MAGNITUDE: 1,
    SlotKind.SQUARED_STEP: 0,
}
_MOMENTS = {"_momentums": SlotKind.GRADIENT, "_velocities": SlotKind.SQUARED_GRADIENT}

_SLOTS: dict[type, dict[str, SlotKind]] = {
    keras.optimizers.SGD: {"momentums": SlotKind.GRADIENT},
    keras.optimizers.Adam: {**_MOMENTS, "_velocity_hats": SlotKind.SQUARED_GRADIENT},
    keras.optimizers.AdamW: {**_MOMENTS, "_velocity_hats": SlotKind.SQUARED_GRADIENT},
    keras.optimizers.Nadam: _MOMENTS,
    keras.optimizers.Lamb: _MOMENTS,
    keras.optimizers.Adamax: {"_m": SlotKind.GRADIENT, "_u": SlotKind.MAGNITUDE},
    keras.optimizers.RMSprop: {**_MOMENTS, "_average_gradients": SlotKind.GRADIENT},
    keras.optimizers.Adagrad: {"_accumulators": SlotKind.SQUARED_GRADIENT},
    keras.optimizers.Adadelta: {
        "_accumulated_grads": SlotKind.SQUARED_GRADIENT,
        "_accumulated_delta_vars": SlotKind.SQUARED_STEP,
    },
    keras.optimizers.Lion: {"_momentums": SlotKind.GRADIENT},
    keras.optimizers.Adafactor: {
        "_r": SlotKind.MEAN_OVER_LAST,
        "_c": SlotKind.MEAN_OVER_SECOND_LAST,
        "_v": SlotKind.SQUARED_GRADIENT,
    },
}
if hasattr(keras.optimizers, "Muon"):  # as is this one
    _SLOTS[keras.optimizers.Muon] = {
        "momentums": SlotKind.GRADIENT,
        "adam_velocities": SlotKind.SQUARED_GRADIENT,
    }
if hasattr(keras.optimizers, "ScheduleFreeAdamW"):  # not in every version of Keras 3
    _SLOTS[keras.optimizers.ScheduleFreeAdamW] = {
        "_momentums": SlotKind.WEIGHT,  # what it calls so is the weights that it averages
        "_velocities": SlotKind.SQUARED_GRADIENT,
    }
# What every optimizer can have besides: gradient accumulation and moving averages of weights.
_COMMON = {
    "_accumulated_gradients": SlotKind.GRADIENT,
    "_model_variables_moving_average": SlotKind.WEIGHT,
}


def register_slots(
    optimizer_class: type[keras.optimizers.Optimizer], slots: Mapping[str, SlotKind | str]
) -> None:
    """Teaches surgery the slots of an optimizer class, and of its subclasses.

    Args:
      optimizer_class: a subclass of `keras.optimizers.Optimizer`.
      slots: attribute that lists slot variables, one per trainable weight -> their kind, a
        `SlotKind` or its value. The moving averages and gradient accumulators that any optimizer
        can have are known.

    Raises:
      TypeError: `optimizer_class` is not an optimizer class.
      ValueError: a kind is unknown.

    Example:

    >>> import keras
    >>> from tfgrow.surgery.optimizer import register_slots
    >>> class Signum(keras.optimizers.Lion):
    ...     pass
    >>> register_slots(Signum, {"_momentums": "gradient"})
    """
    base = keras.optimizers.Optimizer
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, base)):
        raise TypeError(
            f"Expected a subclass of keras.optimizers.Optimizer. Found {optimizer_class!r}."
        )
    _SLOTS[optimizer_class] = {name: SlotKind(kind) for name, kind in slots.items()}


def check_optimizer(model: keras.Model, unbuilt: bool = False) -> None:
    """Raises ValueError if slots of the model's optimizer can't be carried over; touches nothing.

    Args:
      model: one without optimizer is fine.
      unbuilt: whether an optimizer that has no slots yet must be one whose slots are known, too.
    """
    for optimizer in _optimizers(model):
        if optimizer.built:
            _slot_lists(optimizer)
        elif unbuilt:
            _slot_kinds(optimizer)


def grow_optimizer(model: keras.Model, replaced: Iterable[rebuild.Replacement]) -> None:
    """Lets the slots of a model's optimizer follow its edited weights, in place.

    Args:
      model: the model after the edit. An optimizer that is not built yet is left so.
      replaced: what `tfgrow.surgery.rebuild.apply_changes` returned.

    Raises:
      ValueError: the optimizer's slots are unknown: check with `check_optimizer` before the edit.

    Example:

    >>> import keras, numpy as np
    >>> from tfgrow.surgery import optimizer, rebuild
    >>> from tfgrow.types import LayerChange, VariableChange
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> change = LayerChange(model.layers[0], {}, {"bias": VariableChange(np.ones(1))})
    >>> optimizer.check_optimizer(model)
    >>> optimizer.grow_optimizer(model, rebuild.apply_changes(model, [change]))
    """
    replaced = list(replaced)
    for optimizer in _built_optimizers(model):
        positions = {id(weight): index for index, weight in enumerate(optimizer_weights(optimizer))}
        for kind, slots in _slot_lists(optimizer):
            for replacement in replaced:
                index = positions.get(id(replacement.variable))
                slot = None if index is None else slots[index]
                if slot is not None and not _is_placeholder(slot, replacement.variable):
                    rebuild.set_value(model, slot, map_slot(slot.numpy(), kind, replacement))
        rebuild.rekey_optimizer(optimizer)


def extend_optimizer(model: keras.Model, newborn: Sequence[keras.Variable]) -> None:
    """Lets a model's optimizer train weights that came to the model after it was built.

    The old weights keep their slots; the new ones get slots as of newborn entries, with the mean
    over all the old. The order becomes that of `model.trainable_variables`, by which files store.

    Args:
      model: the model with its new weights. An optimizer that is not built yet is left so.
      newborn: the new trainable weights.

    Raises:
      ValueError: the optimizer's slots are unknown, or it can't be made anew from its config.
    """
    with model.distribute_strategy.scope():
        for optimizer in _built_optimizers(model):
            if newborn and _trains_all(optimizer, model, newborn):
                _extend(optimizer, _in_order(optimizer_weights(optimizer), newborn, model))


def _trains_all(optimizer, model: keras.Model, newborn: Sequence[keras.Variable]) -> bool:
    """Whether an optimizer trains the whole model, not a part of it by a train step of its own."""
    known = {id(weight) for weight in [*optimizer_weights(optimizer), *newborn]}
    return all(id(weight) in known for weight in model.trainable_variables)


def _in_order(old, newborn, model: keras.Model) -> list[keras.Variable]:
    """The weights in the order of the model, those that it does not hold (any more) at the end."""
    wanted = {id(weight): weight for weight in [*old, *newborn]}
    # Not `trainable_variables`: a layer may have been frozen since the optimizer was built.
    held = [wanted.pop(id(weight)) for weight in model.variables if id(weight) in wanted]
    return [*held, *wanted.values()]


def _extend(optimizer: keras.optimizers.Optimizer, weights: list[keras.Variable]) -> None:
    """Takes a freshly built optimizer as the guide to the order of all variables."""
    guide = _built_alike(optimizer, weights)
    positions = {id(weight): index for index, weight in enumerate(optimizer_weights(optimizer))}
    slots: dict[str, list] = {}
    place: dict[int, keras.Variable] = {}  # the variable that takes the place of a guide's
    for name, kind in _slot_kinds(optimizer).items():
        if not (old := getattr(optimizer, name, None)):
            continue
        slots[name] = []
        kin = _used(old, optimizer_weights(optimizer))
        for weight, fresh in zip(weights, getattr(guide, name), strict=True):
            index = positions.get(id(weight))
            slot = fresh if index is None else old[index]
            if index is None and fresh is not None and not _is_placeholder(fresh, weight):
                fresh.assign(_neutral(kind, weight, fresh, kin))
            place[id(fresh)] = slot
            slots[name].append(slot)
    kept = {id(slot) for of_weights in slots.values() for slot in of_weights}
    counters = [v for v in own_variables(optimizer) if id(v) not in kept]
    hidden = {id(getattr(guide, name, None)) for name in _unlisted(optimizer)}
    listed = [v for v in own_variables(guide) if id(v) not in hidden]
    theirs = [v for v in listed if id(v) not in place]
    if [v.shape for v in counters] != [v.shape for v in theirs]:
        raise ValueError(
            f"Optimizer '{optimizer.name}' ({type(optimizer).__name__}) made from its config has "
            f"the variables {[v.name for v in theirs]} beside its slots, this one has "
            f"{[v.name for v in counters]}: it can't take up new weights. Let its get_config() "
            "describe it."
        )
    place.update((id(v), counter) for v, counter in zip(theirs, counters, strict=True))
    variables = [place[id(variable)] for variable in listed]
    rebuild.refit_optimizer(optimizer, weights, variables, slots)


def _unlisted(optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Attributes that hold variables which the optimizer does not list among its own.

    Inside a `LossScaleOptimizer` Keras leaves out the product that Nadam keeps.
    """
    listed = {id(variable) for variable in own_variables(optimizer)}
    return [
        name
        for name, value in vars(optimizer).items()
        if isinstance(value, keras.Variable) and id(value) not in listed
    ]


def _built_alike(optimizer, weights: list[keras.Variable]) -> keras.optimizers.Optimizer:
    try:
        guide = type(optimizer).from_config(optimizer.get_config())
        guide.build(weights)
    except Exception as error:
        raise ValueError(
            f"Optimizer '{optimizer.name}' ({type(optimizer).__name__}) can't be made anew from "
            "its config, so that it can't take up new weights: give it a get_config() that "
            f"describes it. {type(error).__name__}: {str(error)[:500]}"
        ) from error
    return guide


def _used(slots: Iterable, weights: Iterable[keras.Variable]) -> list[keras.Variable]:
    """Those of the slots of some weights that hold anything."""
    pairs = zip(slots, weights, strict=True)
    return [s for s, weight in pairs if s is not None and not _is_placeholder(s, weight)]


def _is_placeholder(slot: keras.Variable, weight: keras.Variable) -> bool:
    """Whether a slot only fills the place of a weight that has none, as Adafactor's of biases."""
    return len(slot.shape) == 0 < len(weight.shape)


def _neutral(
    kind: SlotKind, weight: keras.Variable, slot: keras.Variable, kin: Iterable[keras.Variable]
) -> keras.Variable | np.ndarray:
    """What a newborn weight's slot holds: as if it had neither moved nor been seen moving."""
    if kind is SlotKind.WEIGHT:
        return weight
    others = [other.numpy().astype(np.float64).ravel() for other in kin]
    if kind is SlotKind.GRADIENT or not others:
        return np.zeros(slot.shape)
    return np.full(slot.shape, np.concatenate(others).mean())


def map_slot(slot: np.ndarray, kind: SlotKind, replacement: rebuild.Replacement) -> np.ndarray:
    """The slot of an edited weight.

    Args:
      slot: the slot of the weight before, of the old shape.
      kind: how it scales.
      replacement: the weight's edit.

    Returns:
      Float64 array of the weight's new shape, without the axis that the kind takes the mean over.
    """
    sources = replacement.change.sources
    slot = np.asarray(slot, dtype=np.float64)
    if (axis := _AVERAGED.get(kind)) is not None:
        # As if all that the mean was taken of had been alike.
        shape = np.shape(replacement.old)
        alike = np.broadcast_to(np.expand_dims(slot, axis), shape)
        return map_slot(alike, SlotKind.SQUARED_GRADIENT, replacement).mean(axis)
    if kind is SlotKind.WEIGHT:
        distance = slot - np.asarray(replacement.old, dtype=np.float64)
        for source in sources:
            distance = source.folded(distance)
            distance = _inherit(distance, source, source.value_scale, calibrated=False)
        return np.asarray(replacement.change.value, dtype=np.float64) + distance
    for source in sources:
        scale = np.asarray(source.gradient_scale, dtype=np.float64)
        if kind is not SlotKind.GRADIENT:
            scale = np.abs(scale) ** _EXPONENT[kind]
        slot = _inherit(slot, source, scale, calibrated=kind is not SlotKind.GRADIENT)
    return slot


def _inherit(
    values: np.ndarray, source: AxisSource, scale: np.ndarray, calibrated: bool
) -> np.ndarray:
    """Entries gathered and scaled along one axis; newborns get 0, or the mean of the inherited."""
    parents = np.asarray(source.source)
    inherited = parents != NEWBORN
    along = [1] * values.ndim
    along[source.axis] = len(parents)
    grown = np.take(values, np.maximum(parents, 0), axis=source.axis) * np.reshape(scale, along)
    grown = np.where(np.reshape(inherited, along), grown, 0.0)
    if calibrated and not inherited.all():
        known = np.compress(inherited, grown, axis=source.axis) if inherited.any() else values
        mean = known.mean(axis=source.axis, keepdims=True)
        grown = np.where(np.reshape(inherited, along), grown, mean)
    return grown


def _built_optimizers(model: keras.Model) -> Iterator[keras.optimizers.Optimizer]:
    return (optimizer for optimizer in _optimizers(model) if optimizer.built)


def _optimizers(model: keras.Model) -> Iterator[keras.optimizers.Optimizer]:
    """The optimizers of the model and of models inside it, wrappers included.

    Those that a model keeps in other attributes too: a train step of its own may use several.
    """
    seen: set[int] = set()
    kept = [value for inner in rebuild.inner_models(model) for value in vars(inner).values()]
    for optimizer in (item for value in kept for item in _items(value)):
        while isinstance(optimizer, keras.optimizers.Optimizer) and id(optimizer) not in seen:
            seen.add(id(optimizer))
            yield optimizer
            optimizer = getattr(optimizer, "inner_optimizer", None)


def _items(value: Any) -> list:
    """The items of a list or dict, or the value itself."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _slot_lists(
    optimizer: keras.optimizers.Optimizer,
) -> list[tuple[SlotKind, list[keras.Variable | None]]]:
    """The optimizer's slots by kind, one per weight; ValueError if it has any we don't know."""
    known = _slot_kinds(optimizer)
    lists = [
        (kind, list(slots))
        for name, kind in known.items()
        if (slots := getattr(optimizer, name, None))
    ]
    weights = optimizer_weights(optimizer)
    if any(len(slots) != len(weights) for _, slots in lists):
        raise ValueError(
            f"Optimizer '{optimizer.name}' ({type(optimizer).__name__}) has slot lists of lengths "
            f"{[len(slots) for _, slots in lists]} for {len(weights)} weights; expected one slot "
            "(or None) per weight in each list."
        )
    ours = {id(slot) for _, slots in lists for slot in slots}
    inner = getattr(optimizer, "inner_optimizer", None)
    ours.update(id(variable) for variable in (inner.variables if inner is not None else ()))
    unknown = [
        variable.name
        for variable in optimizer.variables
        if variable.shape.rank and id(variable) not in ours
    ]
    if unknown:
        raise ValueError(
            f"Optimizer '{optimizer.name}' ({type(optimizer).__name__}) has variables that surgery "
            f"does not know: {unknown[:3]}, {len(unknown)} in all. Name the attributes that list "
            "them: tfgrow.surgery.optimizer.register_slots("
            f"{type(optimizer).__name__}, {{attribute: kind}})."
        )
    return lists


def _slot_kinds(optimizer: keras.optimizers.Optimizer) -> dict[str, SlotKind]:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return {}
    for ancestor in type(optimizer).__mro__:
        if ancestor in _SLOTS:
            return {**_SLOTS[ancestor], **_COMMON}
    raise ValueError(
        f"Surgery does not know the slots of optimizer '{optimizer.name}' "
        f"({type(optimizer).__name__}). It knows {sorted(known.__name__ for known in _SLOTS)}, "
        "their subclasses and LossScaleOptimizer. Teach it another: "
        f"tfgrow.surgery.optimizer.register_slots({type(optimizer).__name__}, {{attribute: kind}})."
    )
