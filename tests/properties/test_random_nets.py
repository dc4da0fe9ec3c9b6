"""Random architectures: whatever the net, growing it keeps its promises."""

import keras
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import tfgrow
from tests.cases import inputs_of, randomize
from tfgrow.capture.capture import prepare_inputs
from tfgrow.capture.execute import execute, tensor_tap
from tfgrow.graph.cost import CostModel, model_flops
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import sites_of
from tfgrow.morphisms.registry import get

EXAMPLES = settings(max_examples=8)

ACTIVATIONS = st.sampled_from([None, "relu", "tanh", "gelu", "leaky_relu"])
PADDINGS = st.sampled_from(["same", "valid"])
CHANNELWISE = {
    "bn": lambda one, same: layers.BatchNormalization(scale=one),
    "relu": lambda one, same: layers.ReLU(),
    "prelu": lambda one, same: layers.PReLU(alpha_initializer="ones"),
    "dropout": lambda one, same: layers.Dropout(0.3),
    "elu": lambda one, same: layers.ELU(),
}
SPATIAL = {
    "pad": lambda one, same: layers.ZeroPadding2D((1, 2)),
    "crop": lambda one, same: layers.Cropping2D(((1, 0), (0, 1))),
    "up": lambda one, same: layers.UpSampling2D((1, 2)),
    "max": lambda one, same: layers.MaxPooling2D(2, strides=1, padding=same),
    "average": lambda one, same: layers.AveragePooling2D(2, padding=same),
    "depthwise": lambda one, same: layers.DepthwiseConv2D(
        2, depth_multiplier=1 if one else 2, use_bias=False, padding="same"
    ),
}


def between(kinds):
    """Up to two channelwise layers."""
    return st.lists(st.tuples(st.sampled_from(sorted(kinds)), st.booleans(), PADDINGS), max_size=2)


CONVOLUTION = st.fixed_dictionaries(
    {
        "filters": st.integers(1, 3),
        "kernel_size": st.integers(1, 2),
        "padding": PADDINGS,
        "strides": st.integers(1, 2),
        "use_bias": st.booleans(),
        "activation": ACTIVATIONS,
    }
)
RECIPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "stages": st.lists(
            st.tuples(CONVOLUTION, between({**CHANNELWISE, **SPATIAL}), st.booleans()),
            min_size=1,
            max_size=2,
        ),
        "flatten": st.booleans(),
        "dense": st.lists(
            st.tuples(st.integers(1, 3), ACTIVATIONS, between(CHANNELWISE)), max_size=2
        ),
    }
)
"""Convolutions, each with layers after it and maybe a residual block, then dense layers."""


def build(recipe):
    """The stock model of a recipe, without the layers that its images have become too small for."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(recipe["seed"])
    x = inputs = keras.Input((7, 7, 2))
    for convolution, after, residual in recipe["stages"]:
        small = min(x.shape[1:3]) <= 2
        x = layers.Conv2D(**{**convolution, **({"padding": "same"} if small else {})})(x)
        for kind, one, same in after:
            if min(x.shape[1:3]) > 2 or kind in CHANNELWISE:
                x = {**CHANNELWISE, **SPATIAL}[kind](one, same)(x)
        if residual:
            inner = layers.Conv2D(2, 1, activation="relu")(x)
            x = layers.Add()([x, layers.Conv2D(x.shape[-1], 1)(inner)])
    x = (layers.Flatten if recipe["flatten"] else layers.GlobalAveragePooling2D)()(x)
    for units, activation, after in recipe["dense"]:
        x = layers.Dense(units, activation=activation)(x)
        for kind, one, same in after:
            x = CHANNELWISE[kind](one, same)(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    randomize(model, recipe["seed"])
    return model


def outputs(model, x):
    return np.asarray(model(x, training=False))


def close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, atol=tolerance * max(1, np.abs(expected).max()))


@EXAMPLES
@given(RECIPES)
def test_converted_stripped_and_executed_alike(recipe):
    stock = build(recipe)
    x = inputs_of(stock, 3)
    expected = outputs(stock, x)
    model = tfgrow.convert(stock)
    close(outputs(model, x), expected, 1e-6)
    close(outputs(tfgrow.strip(model), x), expected, 1e-6)
    graph = trace(model)
    values = execute(graph, prepare_inputs(graph, x))
    close(values[tensor_tap(graph.outputs[0])], expected, 1e-6)


@EXAMPLES
@given(RECIPES, st.integers(0, 100))
def test_at_rest_every_edit_at_once_preserves_the_function(recipe, seed):
    model = tfgrow.convert(build(recipe))
    x = inputs_of(model, 4)
    before = outputs(model, x)
    graph = trace(model)
    sites = sites_of(model, graph)
    free = {site.name: site.units for site in sites if not site.blocked}
    if not free:
        return
    costs = CostModel(graph, sites).extra({name: units + 1 for name, units in free.items()})
    params, flops = model.count_params(), model_flops(graph)
    candidates = tfgrow.candidates(model, new_units=1, seed=seed)
    event = tfgrow.apply(model, [get(c.morphism).scaled(c, 0.0) for c in candidates])
    close(outputs(model, x), before, 1e-5)
    assert event.widths == {name: (units, 2 * units + 1) for name, units in free.items()}
    assert model.count_params() - params == costs.params
    assert model_flops(trace(model)) - flops == costs.flops
    close(outputs(tfgrow.strip(model), x), before, 1e-5)


@EXAMPLES
@given(RECIPES, st.lists(st.tuples(st.integers(0, 9), st.integers(1, 2)), max_size=3))
def test_widening_again_and_again_preserves_the_function(recipe, steps):
    model = tfgrow.convert(build(recipe))
    x = inputs_of(model, 3)
    before = outputs(model, x)
    names = [site.name for site in tfgrow.find_sites(model) if not site.blocked]
    for seed, (which, units) in enumerate(steps if names else []):
        tfgrow.widen(model, names[which % len(names)], units, seed=seed)
    close(outputs(model, x), before, 1e-5)
    rebuilt = keras.Model.from_config(model.get_config())
    rebuilt.set_weights(model.get_weights())
    close(outputs(rebuilt, x), before, 1e-5)
