"""Forward mode against reverse mode, also where TensorFlow has none."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfgrow
from tests.cases import randomize
from tfgrow.capture.capture import find_head, prepare_inputs
from tfgrow.capture.execute import execute, tensor_tap
from tfgrow.capture.forward import push_forward
from tfgrow.graph.nodes import trace


def rows(x):
    return layers.Reshape((36, 4))(x)


@tf.function
def resized(x):
    return tf.image.resize(x, (9, 9))


def resized_in_a_function(x):
    return resized(x)


WITHOUT = {
    "bilinear": lambda x: layers.UpSampling2D(interpolation="bilinear")(x),
    "bicubic": lambda x: layers.UpSampling2D(interpolation="bicubic")(x),
    "resizing": lambda x: layers.Resizing(4, 4)(x),
    "nearest": lambda x: layers.Resizing(9, 9, interpolation="nearest")(x),
    "operation": lambda x: ops.image.resize(x, (9, 9)),
    "function": lambda x: layers.Lambda(resized_in_a_function, output_shape=(9, 9, 4))(x),
    "softsign": lambda x: layers.Activation("softsign")(x),
    "lstm": lambda x: layers.LSTM(3)(rows(x)),
    "bidirectional": lambda x: layers.Bidirectional(layers.GRU(2))(rows(x)),
    "half": lambda x: layers.Add()([layers.Resizing(6, 6)(layers.AveragePooling2D(2)(x)), x]),
}
"""Behind a convolution that reads a site; forward accumulators fail on these, or say nothing."""


def network(behind):
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 1, activation="tanh", name="grows")(inputs)
    x = behind(layers.Conv2D(4, 1, name="reads")(x))
    stock = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))
    randomize(stock)
    model = tfgrow.convert(stock)
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("name", WITHOUT)
def test_forward_mode_is_the_transpose_of_reverse_mode(name, rng):
    graph = trace(network(WITHOUT[name]))
    head, x = find_head(graph), rng.normal(size=(5, 6, 6, 2)).astype("float32")
    tap = tensor_tap(graph.nodes[0].outputs[0])
    with tf.GradientTape() as tape:

        def watch(at, value):
            if at == tap:
                value = tf.identity(value)
                tape.watch(value)
            return value

        values = execute(graph, prepare_inputs(graph, x), watch)
        logits = values[head.tap]
    cotangent = rng.normal(size=logits.shape).astype("float32")
    back = tape.gradient(logits, values[tap], output_gradients=cotangent)
    tangent = rng.normal(size=back.shape).astype("float32")
    (same,), (pushed,) = push_forward(graph, [head], x, {tap: tf.constant(tangent)})
    np.testing.assert_allclose(same, logits, rtol=1e-5, atol=1e-6)
    expected = np.sum(tangent * back)
    assert np.sum(pushed * cotangent) == pytest.approx(expected, rel=2e-3, abs=1e-3)
    assert abs(expected) > 0.02


def test_tangents_of_zero_push_to_zero(rng):
    graph = trace(network(WITHOUT["bilinear"]))
    tap = tensor_tap(graph.nodes[0].outputs[0])
    x = rng.normal(size=(5, 6, 6, 2)).astype("float32")
    _, (pushed,) = push_forward(graph, [find_head(graph)], x, {tap: tf.zeros((5, 6, 6, 3))})
    assert not np.any(pushed)


def test_what_fails_without_growth_too_still_fails(rng):
    graph = trace(network(WITHOUT["bilinear"]))
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        push_forward(graph, [find_head(graph)], rng.normal(size=(5, 6, 6, 7)), {})


@pytest.mark.parametrize("name", ["bilinear", "lstm", "softsign", "half"])
def test_a_budget_is_spent_behind_them(name, rng):
    """By default the whole set of edits is estimated in forward mode before it is taken."""
    model = network(WITHOUT[name])
    x = rng.normal(size=(96, 6, 6, 2)).astype("float32")
    data = x, np.stack([np.sin(x[:, 0, 0, 0]), x[:, 1, 1, 1] ** 2, x.mean(axis=(1, 2, 3))], 1)
    oracle = tfgrow.GaussNewtonOracle("loss", max_params=2 * model.count_params(), seed=0)
    growth = tfgrow.callbacks.Growth(oracle, data, every=1)
    model.fit(*data, epochs=2, callbacks=[growth], verbose=0)
    event = growth.events[0]
    assert event.status == "applied"
    assert event.estimated_change < 0
    assert event.measured_change < 0
