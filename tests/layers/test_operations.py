"""Operations called on tensors: those that treat every element alone, and how they were called."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import tfgrow
from tests.cases import by_name, inputs_of
from tfgrow.layers.operations import _ELEMENTWISE, is_elementwise_operation
from tfgrow.layers.registry import blocked_reason, channelwise_view

CALLS = {
    "add": lambda x: x + 3.0,
    "add, the number first": lambda x: 3 + x,
    "add, by name": lambda x: ops.add(x1=x, x2=2.0),
    "multiply": lambda x: x * (1 / 6),
    "subtract from": lambda x: 1.0 - x,
    "divide": lambda x: x / 2.0,
    "divide by": lambda x: 1.0 / x,
    "square": ops.square,
    "power": lambda x: x**2,
    "negative": lambda x: -x,
    "abs": abs,
    "a number as a tensor": lambda x: x * ops.ones((1, 1)),
    "relu": ops.relu,
    "relu with a slope": lambda x: keras.activations.relu(x, negative_slope=0.1, max_value=2.0),
    "relu6": lambda x: ops.relu6(x + 3.0),
    "leaky relu": lambda x: ops.leaky_relu(x, negative_slope=0.3),
    "gelu": lambda x: keras.activations.gelu(x, approximate=True),
    "silu": keras.activations.swish,
    "sigmoid": ops.sigmoid,
    "tanh": ops.tanh,
    "softplus": ops.softplus,
    "elu": lambda x: keras.activations.elu(x, alpha=0.5),
    "selu": ops.selu,
    "hard sigmoid": ops.hard_sigmoid,
    "exp": ops.exp,
    "clip": lambda x: ops.clip(x, -0.5, 0.5),
    "maximum": lambda x: ops.maximum(x, 0.0),
    "sqrt of a sum": lambda x: ops.sqrt(ops.exp(x) + 1.0),
    "erf": ops.erf,
    "cast": lambda x: ops.cast(x, "float32"),
}


def build(function):
    inputs = keras.Input((4,))
    hidden = function(layers.Dense(3, name="a")(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="out")(hidden))
    model.get_layer("a").bias.assign([0.3, -0.2, 0.1])
    return model


@pytest.mark.parametrize("name", CALLS)
def test_models_grow_through_operations(name):
    stock = build(CALLS[name])
    model = tfgrow.convert(stock)
    assert tfgrow.find_sites(model)[0].blocked is None
    x = inputs_of(model, 5)
    np.testing.assert_allclose(model(x), stock(x), atol=1e-6)
    for step in tfgrow.find_sites(model)[0].steps:  # on some of the channels alone
        values = np.random.default_rng(1).standard_normal((5, 3)).astype("float32")
        some = step.view.apply_channels(values[:, 1:], {})
        whole = step.view.apply_channels(values, {})
        np.testing.assert_allclose(some, np.asarray(whole)[:, 1:], rtol=1e-6)
    before = np.asarray(model(x))
    tfgrow.widen(model, "a", 2)
    np.testing.assert_allclose(model(x), before, atol=1e-5)
    np.testing.assert_allclose(tfgrow.strip(model)(x), before, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x + np.ones(3, "float32"), r"\(Add\) has a constant of shape \(3,\)"),
        (lambda x: ops.multiply(np.ones((1, 3), "float32"), x), r"constant of shape \(1, 3\)"),
        (lambda x: x + np.ones((1, 1, 1), "float32"), r"constant of shape \(1, 1, 1\)"),
        (lambda x: ops.clip(x, np.zeros(3), 1.0), r"\(Clip\) has a constant of shape \(3,\)"),
        (lambda x: ops.cast(x, "float16"), "casts to float16"),
        (lambda x: ops.softmax(x), r"\(Softmax\), which mixes channels or is unknown"),
        (lambda x: ops.reshape(x, (-1, 3)), r"\(Reshape\), which mixes channels or is unknown"),
        (lambda x: ops.flip(x, axis=-1), r"\(Flip\), which mixes channels or is unknown"),
    ],
)
def test_other_calls_block(function, reason):
    model = tfgrow.convert(build(function))
    with pytest.raises(ValueError, match=reason):
        tfgrow.candidates(model, sites=["a"])


def test_the_table_names_classes_that_keras_has():
    import importlib

    for module, name in _ELEMENTWISE:
        kind = getattr(importlib.import_module(module), name)
        assert issubclass(kind, keras.Operation), name
        assert not issubclass(kind, layers.Layer), name


def test_converted_models_have_operations_of_their_own():
    """An operation of two models has two calls, and would not know which is meant."""
    stock = by_name("operations").stock()
    models = [tfgrow.convert(stock), tfgrow.convert(stock)]
    own = [
        {id(step.layer) for site in tfgrow.find_sites(model) for step in site.steps}
        for model in models
    ]
    assert own[0].isdisjoint(own[1])
    assert [site.blocked is None for site in tfgrow.find_sites(models[0])][:3] == [True] * 3


def test_operations_of_a_cloned_model_are_told_apart():
    """`clone_model` calls the very operations of its model again."""
    stock = by_name("operations").stock()
    keras.models.clone_model(stock)
    model = tfgrow.convert(stock)
    assert [site.blocked is None for site in tfgrow.find_sites(model)][:3] == [True] * 3


def test_an_operation_of_two_models_blocks():
    relu = type(ops.relu(keras.Input((3,)))._keras_history.operation)()
    assert is_elementwise_operation(relu)
    inputs = keras.Input((4,))
    relu(keras.Input((7,)))
    hidden = relu(tfgrow.layers.Dense(3, name="a")(inputs))
    model = keras.Model(inputs, tfgrow.layers.Dense(2)(hidden))
    assert channelwise_view(relu) is not None
    assert "part of 2 models" in blocked_reason(relu)
    assert "part of 2 models" in tfgrow.find_sites(model)[0].blocked


def test_files_keep_operations(tmp_path):
    model = by_name("operations").model()
    tfgrow.widen(model, "conv1", 2)
    model.save(tmp_path / "grown.keras")
    loaded = keras.models.load_model(tmp_path / "grown.keras")
    x = inputs_of(model, 3)
    np.testing.assert_array_equal(loaded(x), model(x))
    assert [site.blocked is None for site in tfgrow.find_sites(loaded)][:3] == [True] * 3
