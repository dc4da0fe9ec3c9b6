"""The project's own executor is the model in inference mode, whatever its precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfgrow
from tests.cases import CASES, by_name, inputs_of
from tfgrow.capture.capture import prepare_inputs
from tfgrow.capture.execute import execute, float32_compute, linear_tap, tensor_tap
from tfgrow.graph.nodes import trace


def run(model, x, intercept=None):
    graph = trace(model)
    values = execute(graph, prepare_inputs(graph, x), intercept)
    return graph, values


def output(model, x):
    graph, values = run(model, x)
    return values[tensor_tap(graph.outputs[0])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_executor_is_the_model(case):
    model = case.model()
    x = inputs_of(model, 5)
    np.testing.assert_allclose(output(model, x), model(x, training=False), atol=1e-6)


def test_executor_of_a_stock_model_with_nested_models():
    model = by_name("nested").stock()
    x = inputs_of(model, 5)
    np.testing.assert_allclose(output(model, x), model(x, training=False), atol=1e-6)


def test_layers_recorded_in_training_mode_run_as_the_model_runs_them():
    inputs = keras.Input((4,))
    x = layers.BatchNormalization()(layers.Dense(3)(inputs), training=True)
    model = tfgrow.convert(keras.Model(inputs, layers.Dropout(0.5)(x)))
    x = inputs_of(model, 6)
    np.testing.assert_allclose(output(model, x), model(x, training=False), atol=1e-6)


def test_masks_reach_the_layers_that_heed_them():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 3, mask_zero=True)(inputs)
    x = layers.Dense(3, activation="relu")(x)
    x = layers.GlobalAveragePooling1D()(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2)(x)))
    tokens = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 6, 1]])
    np.testing.assert_allclose(output(model, tokens), model(tokens), atol=1e-6)


def test_interception_replaces_what_flows_on():
    model = by_name("perceptron").model()
    x = inputs_of(model, 4)
    graph = trace(model)
    wanted = linear_tap(graph.calls(model.get_layer("dense1"))[0].index)
    _, values = run(model, x, lambda tap, value: value * 0 if tap == wanted else value)
    assert not values[wanted].numpy().any()
    silent = [layer for layer in model.layers if layer.name != "dense1"]
    hidden = np.zeros((4, 4), "float32")
    for layer in silent:
        hidden = layer(hidden, training=False) if layer.name == "drop" else layer(hidden)
    np.testing.assert_allclose(values[tensor_tap(graph.outputs[0])], hidden, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_models_run_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    half = by_name("conv_bn_relu").model()
    keras.config.set_dtype_policy("float32")
    full = by_name("conv_bn_relu").model()
    full.set_weights(half.get_weights())
    x = inputs_of(full, 5)
    with float32_compute(half):
        _, values = run(half, x)
    assert {value.dtype for value in values.values()} == {tf.float32}
    np.testing.assert_array_equal(output(full, x), values[tensor_tap(trace(half).outputs[0])])
    assert half.get_layer("conv1").dtype_policy.name == policy
    assert half(x).dtype != tf.float32


def test_policies_come_back_after_an_error():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = by_name("two_inputs").model()

    def fail_inside():
        with float32_compute(model):
            assert model.get_layer("first").compute_dtype == "float32"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert model.get_layer("first").compute_dtype == "bfloat16"
