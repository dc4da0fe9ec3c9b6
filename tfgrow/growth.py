"""Growing by hand: apply chosen candidates, widen a layer, or prune it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tfgrow._checks import require_whole
from tfgrow.graph.cost import model_flops
from tfgrow.graph.nodes import functional_of, trace
from tfgrow.graph.sites import find_sites
from tfgrow.morphisms.base import Candidate
from tfgrow.morphisms.prune import copies_of
from tfgrow.morphisms.registry import apart, check_current, get
from tfgrow.morphisms.registry import candidates as make_candidates
from tfgrow.surgery.apply import apply_edits
from tfgrow.types import GrowthEvent


def apply(model: keras.Model, candidates: Sequence[Candidate] | Candidate) -> GrowthEvent:
    """Applies candidates to a model in place, inside or outside `fit`.

    The same Python object gets the new shape: `summary()`, `count_params()`, `layer.output.shape`,
    `save()`, `export()` and a continuing `fit` all see it, and the optimizer's state is carried
    over channel by channel. All or nothing: on any error the model is as before. A `tf.function`
    of your own that was traced before (a train step, `predict` of a feature extractor made of the
    same layers) goes on computing with the weights as they were, and says nothing: make it anew
    after every edit. Kernels with a constraint are not projected onto it here, but when they are
    trained next.

    Args:
      model: the growable model the candidates were made for.
      candidates: usually learned by an estimator; at most one edit per unit. Or a single one.

    Returns:
      The event: what was applied, widths, parameters and FLOPs before and after.

    Raises:
      ValueError: if the candidates are of another model, or of this one before it last grew.

    Example:

    >>> import keras, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu", name="a"), keras.layers.Dense(2)]))
    >>> tfgrow.apply(model, tfgrow.candidates(model, "split")[:2]).applied
    ({'site': 'a', 'morphism': 'split', 'units': [0, 1]},)
    >>> model.get_layer("a").units, model.count_params()
    (5, 37)
    """
    started = time.perf_counter()
    chosen = checked(model, candidates)
    before = size_of(model)
    widths = widths_of(model)
    apply_edits(model, edits_of(chosen))
    after = size_of(model)
    return GrowthEvent(
        epoch=0,
        applied=describe(chosen),
        widths=widths_changed(widths, model),
        params_before=before[0],
        params_after=after[0],
        flops_before=before[1],
        flops_after=after[1],
        estimated_change=None,
        measured_change=None,
        loss_before=None,
        alpha=1.0,
        seconds={"surgery": time.perf_counter() - started},
        newborn=newborn_of(chosen),
    )


def widen(model: keras.Model, layer: str, units: int, seed: int = 0) -> GrowthEvent:
    """Adds units to a layer without changing what the model computes.

    New units get random incoming weights of the size of the others', and zero outgoing ones.

    Args:
      model: a growable model.
      layer: name of the layer to widen (a site).
      units: how many to add.
      seed: of the random weights.

    Returns:
      The event, as from `apply`.

    Example:

    >>> import keras, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu", name="a"), keras.layers.Dense(2)]))
    >>> tfgrow.widen(model, "a", 2).widths
    {'a': (3, 5)}
    """
    if not isinstance(layer, str):
        raise TypeError(f"widen takes the name of a layer, found {layer!r}.")
    require_whole("units", units, optional=False)
    new = make_candidates(model, ("add",), sites=[layer], new_units=int(units), seed=seed)
    return apply(model, new)


def prune(model: keras.Model, layer: str, units: Sequence[int]) -> GrowthEvent:
    """Removes units of a layer.

    What the model computes is unchanged where it can be: for units that the layers after them do
    not use, and for exact copies of units that stay, which take over their outgoing weights. To let
    the others stand in for any unit as well as they can, learn candidates of `"prune"` with
    `GaussNewtonEstimator.learn` on data and `apply` them.

    Args:
      model: a growable model.
      layer: name of the layer to prune (a site).
      units: which to remove, by index.

    Returns:
      The event, as from `apply`.

    Raises:
      ValueError: for a layer that can't be pruned, or units that it does not have.

    Example:

    >>> import keras, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu", name="a"), keras.layers.Dense(2)]))
    >>> tfgrow.prune(model, "a", units=[1]).widths
    {'a': (3, 2)}
    """
    if not isinstance(layer, str):
        raise TypeError(f"prune takes the name of a layer, found {layer!r}.")
    removable = {c.unit: c for c in make_candidates(model, ("prune",), sites=[layer])}
    if not removable:
        raise ValueError(f"Layer '{layer}' has a single unit, which can't be removed.")
    wanted = list(units) if isinstance(units, Iterable) else None
    if wanted is None or any(isinstance(unit, (bool, np.bool_)) for unit in wanted):
        raise TypeError(f"units takes indices such as [0, 2]. Found: {units!r}")
    unknown = [unit for unit in wanted if unit not in removable]
    if unknown or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(
            f"units must be some of the units {sorted(removable)} of layer '{layer}', each once; "
            f"found {units!r}."
        )
    going = set(wanted)
    copies = copies_of(removable[wanted[0]].site)
    chosen = []
    for unit in wanted:
        candidate = removable[unit]
        share = np.zeros(candidate.site.units, "float32")
        share[[other for other in copies[unit] if other not in going][:1]] = 1.0
        chosen.append(candidate.replace(theta={**candidate.theta, "share": share}))
    return apply(model, chosen)


def checked(model: keras.Model, candidates: Sequence[Candidate] | Candidate) -> list[Candidate]:
    """The candidates, if there are any and all are of this model as it is now."""
    functional_of(model)  # raises for what has no graph
    given: Any = candidates
    chosen = list(given) if isinstance(given, Iterable) else [given]
    if not chosen:
        raise ValueError("No candidates to apply; make some with tfgrow.candidates(model).")
    for candidate in chosen:
        if not isinstance(candidate, Candidate):
            raise TypeError(
                f"Expected Candidates, found {type(candidate).__name__}; make them with "
                "tfgrow.candidates(model)."
            )
        check_current(model, candidate.site)
    repeated = [key for key, count in Counter(c.key for c in chosen).items() if count > 1]
    if repeated:
        site, morphism, unit = repeated[0]
        raise ValueError(f"The {morphism} of unit {unit} of site '{site}' is given twice.")
    _check_thetas(chosen)
    _check_apart(chosen)
    return chosen


def _check_apart(chosen: Sequence[Candidate]) -> None:
    """Raises ValueError for candidates that can't be applied at once."""
    clashes = apart(chosen)
    for row, column in np.argwhere(clashes):
        raise ValueError(
            f"{chosen[row]!r} and {chosen[column]!r} can't be applied at once: a new branch is "
            "made for the channels that are there. Apply one, then make candidates anew."
        )


def _check_thetas(chosen: Sequence[Candidate]) -> None:
    """Raises ValueError for parameters that are not finite, or of shapes they never had."""
    shapes: dict[tuple, dict[str, tuple]] = {}
    for candidate in chosen:
        morphism = get(candidate.morphism)
        kind = (candidate.site.name, candidate.morphism, morphism.group_key(candidate))
        if kind not in shapes:
            every = morphism.candidates(candidate.site, new_units=1, seed=0)
            like = next(c for c in every if morphism.group_key(c) == kind[2])
            shapes[kind] = {name: np.shape(value) for name, value in like.theta.items()}
        for name, shape in shapes[kind].items():
            value = np.asarray(candidate.theta.get(name))
            if value.shape != shape or not np.isfinite(value).all():
                raise ValueError(
                    f"theta['{name}'] of {candidate!r} must be finite and of shape {shape}; found "
                    f"shape {value.shape}, {value.reshape(-1)[:8]}... Learn it with "
                    "GaussNewtonEstimator.learn, on data without NaN."
                )


def edits_of(candidates: Sequence[Candidate]) -> list:
    """The candidates as edits that surgery understands."""
    return [get(candidate.morphism).edit(candidate) for candidate in candidates]


def describe(candidates: Sequence[Candidate]) -> tuple[dict, ...]:
    """What is applied, one entry per site and morphism, JSON-ready."""
    units: dict[tuple[str, str], list[int]] = {}
    for candidate in candidates:
        units.setdefault((candidate.site.name, candidate.morphism), []).append(int(candidate.unit))
    return tuple(
        {"site": site, "morphism": morphism, "units": sorted(which)}
        for (site, morphism), which in units.items()
    )


def newborn_of(candidates: Sequence[Candidate]) -> dict[str, int]:
    """Site name -> number of units that the candidates bring."""
    newborn: Counter[str] = Counter()
    for candidate in candidates:
        newborn[candidate.site.name] += get(candidate.morphism).newborn(candidate)
    return {name: units for name, units in newborn.items() if units}


def widths_of(model: keras.Model) -> dict[str, int]:
    """Units of every site that can grow, by name."""
    return {site.name: site.units for site in find_sites(model) if site.resizable}


def widths_changed(before: Mapping[str, int], model: keras.Model) -> dict[str, tuple[int, int]]:
    """Site name -> (units before, units now) where they differ; `before` is from `widths_of`.

    Sites of layers that are new had none.
    """
    # By layer: a site of one unit that is left can be blocked, or go by another layer's name.
    sites = find_sites(model)
    now = {name: site.units for site in sites for name in site.names}
    changed = {name: (units, now[name]) for name, units in before.items() if units != now[name]}
    new = {
        site.name: (0, site.units)
        for site in sites
        if site.blocked is None and not set(site.names) & set(before)
    }
    return {**changed, **new}


def size_of(model: keras.Model) -> tuple[int, int]:
    """Parameters of a model, and inference FLOPs per sample."""
    return model.count_params(), model_flops(trace(model))
