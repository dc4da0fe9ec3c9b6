"""Gradients, columns and tangents against finite differences of the model."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfgrow
from tests.cases import CASES, by_name, class_data, regression_data
from tfgrow.capture import capture as capturing
from tfgrow.capture.capture import (
    capture,
    consumer_taps,
    find_head,
    leaf_taps,
    observe,
    prepare_inputs,
)
from tfgrow.capture.execute import execute, linear_tap, tensor_tap
from tfgrow.capture.forward import push_forward
from tfgrow.curvature.loss_head import make_loss_head
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import sites_of

SMOOTH = [case.name for case in CASES if case.smooth]
STEP = 1e-2


@pytest.fixture(scope="module", params=SMOOTH)
def net(request):
    return Net(by_name(request.param).model(), "mse")


class Net:
    """A model with its taps, and finite differences of what it computes."""

    def __init__(self, model, loss):
        self.graph = trace(model)
        self.head = find_head(self.graph)
        self.loss = make_loss_head(loss, self.head.activation)
        data = regression_data if loss == "mse" else class_data
        self.x, self.y = data(model, 5)
        sites = [site for site in sites_of(model, self.graph) if not site.blocked]
        self.taps = [tap for site in sites for tap in leaf_taps(site) + consumer_taps(site)]
        self.values = observe(self.graph, self.x).values

    def direction(self, tap, seed=0):
        shape = self.values[tap].shape
        return np.random.default_rng(seed).standard_normal(shape).astype("float32")

    def logits(self, shifts):
        """The logits with some taps' values shifted."""
        inputs = prepare_inputs(self.graph, self.x)
        values = execute(self.graph, inputs, lambda tap, value: value + shifts.get(tap, 0.0))
        return values[self.head.tap]

    def slope(self, shifts):
        """Derivative of the logits along the shifts, by central differences."""

        def at(size):
            return self.logits({tap: size * shift for tap, shift in shifts.items()})

        # the fourth-order rule: float32 allows no smaller step
        near, far = at(STEP) - at(-STEP), at(2 * STEP) - at(-2 * STEP)
        return (8 * near - far) / (12 * STEP)

    def per_sample(self, cotangent, shift):
        product = np.asarray(cotangent) * np.asarray(shift)
        return product.reshape(len(product), -1).sum(axis=1)


def test_gradient_and_columns_are_derivatives(net):
    logits = net.values[net.head.tap]
    gradient, columns = net.loss.gradient(net.y, logits), net.loss.factors(net.y, logits, "exact")
    taken = capture(
        net.graph,
        [net.head],
        net.x,
        net.taps,
        lambda z: {0: gradient},
        lambda z: [{0: column} for column in columns],
    ).cotangents
    for tap in net.taps:
        shift = net.direction(tap)
        slope = net.slope({tap: shift})
        for mine, cotangent in zip(taken[tap], [gradient, *columns], strict=True):
            expected = net.per_sample(cotangent, slope)
            scale = np.abs(expected).max() + 1e-3
            found = net.per_sample(mine, shift)
            np.testing.assert_allclose(found / scale, expected / scale, atol=5e-3)


def test_forward_mode_is_the_derivative(net):
    shifts = {tap: net.direction(tap, seed) for seed, tap in enumerate(net.taps[:2])}
    tangents = {tap: tf.constant(shift) for tap, shift in shifts.items()}
    (logits,), (pushed,) = push_forward(net.graph, [net.head], net.x, tangents)
    np.testing.assert_allclose(logits, net.values[net.head.tap], atol=1e-6)
    np.testing.assert_allclose(pushed, net.slope(shifts), atol=5e-3 * np.abs(pushed).max())


def test_gradient_is_that_of_the_models_own_loss():
    """With a softmax at the end: the head is before it, and the slopes are the loss's own."""
    net = Net(by_name("augmented").model(), "sparse_categorical_crossentropy")
    tap = net.taps[0]
    shift = net.direction(tap)
    taken = capture(
        net.graph,
        [net.head],
        net.x,
        [tap],
        lambda z: {0: net.loss.gradient(net.y, *z)},
        lambda z: [{0: z[0]}],
    ).cotangents

    def losses(size):
        probabilities = tf.nn.softmax(net.logits({tap: size * shift}))
        return keras.losses.sparse_categorical_crossentropy(net.y, probabilities)

    slope = (losses(1e-2) - losses(-1e-2)) / 2e-2
    np.testing.assert_allclose(net.per_sample(taken[tap][0], shift), slope, atol=2e-3)


def head_of(*last):
    inputs = keras.Input((4,))
    x = layers.Dense(3, name="hidden")(inputs)
    for layer in last:
        x = layer(x)
    model = tfgrow.convert(keras.Model(inputs, x))
    return trace(model), find_head(trace(model))


def test_head_is_before_the_activation_that_belongs_to_the_loss():
    graph, head = head_of(layers.Dense(2, activation="softmax"))
    assert head.tap == linear_tap(graph.nodes[-1].index)
    assert head.activation is keras.activations.softmax
    for last in (layers.Softmax(), layers.Activation("sigmoid")):
        graph, head = head_of(layers.Dense(2), last)
        assert head.tap == tensor_tap(graph.nodes[-1].inputs[0])
        assert head.activation is not None
    graph, head = head_of(layers.Dense(2), layers.Reshape((2, 1)))
    assert head.tap == tensor_tap(graph.outputs[0])
    assert head.activation is None


def test_each_output_has_a_head():
    inputs = keras.Input((4,))
    inner = layers.Dense(3, "softmax", name="inner")(inputs)
    outer = layers.Dropout(0.5)(layers.Dense(2, "sigmoid", name="outer")(inner))
    graph = trace(tfgrow.convert(keras.Model(inputs, [outer, inner, inputs])))
    assert graph.output_keys[1] == "inner"
    by_name = {node.name: node.index for node in graph.nodes}
    assert find_head(graph, 0).tap == linear_tap(by_name["outer"])
    assert find_head(graph, 1).tap == linear_tap(by_name["inner"])
    with pytest.raises(ValueError, match=r"output 'input.*' is one of its inputs"):
        find_head(graph, 2)
    with pytest.raises(ValueError, match="output is one of its inputs"):
        find_head(trace(keras.Model(inputs, inputs)))


def test_backward_passes_of_deep_models_run_in_a_loop(monkeypatch):
    """They are the same ones, traced once."""
    net = Net(by_name(SMOOTH[0]).model(), "mse")
    outputs = int(net.values[net.head.tap].shape[-1])

    def columns(logits):
        return [{0: logits[0] * (1.0 + number)} for number in range(outputs)]

    def of_batch(x):
        found = capture(net.graph, [net.head], x, net.taps, lambda z: {0: z[0]}, columns)
        return found.cotangents

    def operations():
        traced = tf.function(of_batch).get_concrete_function(net.x)
        return len(traced.graph.get_operations()), traced(net.x)

    flat, expected = operations()
    monkeypatch.setattr(capturing, "DEEP", 0)
    looped, found = operations()
    assert looped < flat
    assert found.keys() == expected.keys()
    for tap, value in found.items():
        assert value.shape == expected[tap].shape
        np.testing.assert_allclose(value, expected[tap], rtol=1e-5, atol=1e-6)


def test_a_layer_that_hands_on_the_very_same_tensor_is_told_from_what_it_reads():
    """Dropout does, at inference: what else reads its input is not behind the dropout."""
    inputs = keras.Input((3,))
    x = layers.Dense(3, activation="tanh", name="stem")(inputs)
    y = layers.Dense(3, name="inner")(layers.Dropout(0.5, name="drop")(x))
    x = layers.Add(name="add")([x, y])
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    estimator = tfgrow.GaussNewtonEstimator(model, "mse", curvature="exact")
    data = regression_data(model, 8)
    candidates = tfgrow.candidates(model, "split", sites=["stem"])
    estimate = estimator.interaction(candidates, data).change()
    assert abs(estimate) > 1e-3
    np.testing.assert_allclose(estimate, estimator.joint_change(candidates, data), rtol=1e-4)


def test_columns_of_several_heads_run_in_a_loop_each(monkeypatch):
    inputs = keras.Input((3,))
    x = layers.Dense(3, activation="tanh", name="stem")(inputs)
    two = keras.Model(inputs, [layers.Dense(2, name="a")(x), layers.Dense(1, name="b")(x)])
    model = tfgrow.convert(two)
    model.compile(loss=["mse", "mse"])
    rng = np.random.default_rng(0)
    x, *y = (rng.standard_normal((6, size)).astype("float32") for size in (3, 2, 1))
    candidates = tfgrow.candidates(model, "split")

    def estimates():
        estimator = tfgrow.GaussNewtonEstimator(model, curvature="exact")
        return estimator.interaction(candidates, (x, y))

    unrolled = estimates()
    monkeypatch.setattr(capturing, "DEEP", 0)
    looped = estimates()
    np.testing.assert_allclose(looped.linear, unrolled.linear, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(looped.gram, unrolled.gram, rtol=1e-5, atol=1e-7)
