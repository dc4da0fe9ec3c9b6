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

EXAMPLES = settings(max_examples=12)

activations = st.sampled_from([None, "relu", "tanh", "gelu", "leaky_relu"])
paddings = st.sampled_from(["same", "valid"])


@st.composite
def channelwise(draw, spatial):
    """A channelwise layer, as a function that makes it."""
    kinds = ["bn", "relu", "prelu", "dropout", "elu"]
    if spatial:
        kinds += ["pad", "crop", "up", "max", "average", "depthwise"]
    kind = draw(st.sampled_from(kinds))
    same = draw(paddings)
    multiplier = draw(st.integers(1, 2))
    return {
        "bn": lambda: layers.BatchNormalization(scale=multiplier == 1),
        "relu": layers.ReLU,
        "prelu": lambda: layers.PReLU(alpha_initializer="ones"),
        "dropout": lambda: layers.Dropout(0.3),
        "elu": layers.ELU,
        "pad": lambda: layers.ZeroPadding2D((1, multiplier)),
        "crop": lambda: layers.Cropping2D(((1, 0), (0, 1))),
        "up": lambda: layers.UpSampling2D((1, 2)),
        "max": lambda: layers.MaxPooling2D(2, strides=1, padding=same),
        "average": lambda: layers.AveragePooling2D(2, padding=same),
        "depthwise": lambda: layers.DepthwiseConv2D(
            2, depth_multiplier=multiplier, use_bias=False, padding="same"
        ),
    }[kind]


@st.composite
def stock_models(draw):
    """Convolutions, then dense layers, with random layers between them; maybe a residual."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(draw(st.integers(0, 1000)))
    x = inputs = keras.Input((7, 7, 2))
    for _ in range(draw(st.integers(1, 2))):
        x = layers.Conv2D(
            draw(st.integers(1, 3)),
            draw(st.integers(1, 2)),
            padding=draw(paddings),
            strides=draw(st.integers(1, 2)),
            use_bias=draw(st.booleans()),
            activation=draw(activations),
        )(x)
        for make in draw(st.lists(channelwise(spatial=True), max_size=2)):
            x = make()(x) if min(x.shape[1:3]) > 2 else x
        if draw(st.booleans()):
            inner = layers.Conv2D(2, 1, activation=draw(activations))(x)
            x = layers.Add()([x, layers.Conv2D(x.shape[-1], 1)(inner)])
    end = draw(st.sampled_from([layers.Flatten, layers.GlobalAveragePooling2D]))
    x = end()(x)
    for _ in range(draw(st.integers(0, 2))):
        x = layers.Dense(draw(st.integers(1, 3)), activation=draw(activations))(x)
        for make in draw(st.lists(channelwise(spatial=False), max_size=2)):
            x = make()(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    randomize(model)
    return model


def outputs(model, x):
    return np.asarray(model(x, training=False))


def close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, atol=tolerance * max(1, np.abs(expected).max()))


@EXAMPLES
@given(stock_models())
def test_converted_stripped_and_executed_alike(stock):
    x = inputs_of(stock, 3)
    expected = outputs(stock, x)
    model = tfgrow.convert(stock)
    close(outputs(model, x), expected, 1e-6)
    close(outputs(tfgrow.strip(model), x), expected, 1e-6)
    graph = trace(model)
    values = execute(graph, prepare_inputs(graph, x))
    close(values[tensor_tap(graph.outputs[0])], expected, 1e-6)


@EXAMPLES
@given(stock_models(), st.integers(0, 100))
def test_at_rest_every_edit_at_once_preserves_the_function(stock, seed):
    model = tfgrow.convert(stock)
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
@given(stock_models(), st.data())
def test_widening_again_and_again_preserves_the_function(stock, data):
    model = tfgrow.convert(stock)
    x = inputs_of(model, 3)
    before = outputs(model, x)
    names = [site.name for site in tfgrow.find_sites(model) if not site.blocked]
    steps = data.draw(st.lists(st.sampled_from(names), max_size=3)) if names else []
    for seed, name in enumerate(steps):
        tfgrow.widen(model, name, data.draw(st.integers(1, 2)), seed=seed)
    close(outputs(model, x), before, 1e-5)
    rebuilt = keras.Model.from_config(model.get_config())
    rebuilt.set_weights(model.get_weights())
    close(outputs(rebuilt, x), before, 1e-5)
