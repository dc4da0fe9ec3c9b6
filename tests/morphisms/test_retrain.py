"""What training the weights that are there would bring: the directions, and taking them as done."""

import keras
import numpy as np
import pytest
from keras import layers

import tfgrow
from tests.cases import by_name, class_data, randomize, regression_data
from tfgrow.graph.nodes import trace
from tfgrow.morphisms import retrain
from tfgrow.morphisms.registry import MORPHISMS, get
from tfgrow.morphisms.retrain import retraining


def estimator_of(model, loss="mse", **kwargs):
    return tfgrow.GaussNewtonEstimator(model, loss=loss, **{"curvature": "exact", **kwargs})


def with_random_steps(model, size=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return [
        c.replace(theta={"step": size * rng.standard_normal(c.theta["step"].shape).astype("f")})
        for c in retraining(model, trace(model))
    ]


def moved(model, steps):
    """The model's weights after all steps: kernels and biases."""
    for candidate in steps:
        layer = candidate.site.producers[int(candidate.state["producer"])].operation
        taps, (block, size) = int(np.prod(layer.kernel_spatial)), candidate.theta["step"].shape
        step = candidate.theta["step"].reshape(block, taps, size // taps)
        kernel, bias = np.array(layer.kernel), np.array(layer.bias)
        rows = kernel.reshape(taps, *kernel.shape[-2:])
        rows[..., candidate.unit] += step[0, :, :-1]
        # Only at places that all taps of the kernel reach is the constant's share the same.
        bias[candidate.unit] += step[0, :, -1].sum()
        layer.kernel.assign(rows.reshape(kernel.shape))
        layer.bias.assign(bias)


def valid_convolutions():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 3, activation="tanh", name="conv1")(inputs)
    x = layers.Conv2D(2, 3, strides=2, activation="tanh", name="conv2")(x)
    outputs = layers.Dense(2, name="out")(layers.Flatten()(x))
    model = keras.Model(inputs, outputs)
    randomize(model)
    return tfgrow.convert(model)


def test_directions_are_those_of_the_weights():
    """The first-order change is the slope of the loss along really moved weights."""
    model = valid_convolutions()
    data = regression_data(model, 10)
    steps = with_random_steps(model)
    assert len(steps) == 3 + 2 + 2
    slope = estimator_of(model, curvature="none").interaction(steps, data).change()
    weights, losses = model.get_weights(), []
    for size in (1e-3, -1e-3):
        moved(model, with_random_steps(model, size))
        losses.append(tfgrow.GaussNewtonEstimator(model, loss="mse").loss(data))
        model.set_weights(weights)
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=2e-2)


@pytest.mark.parametrize("name", ["conv_bn_relu", "two_inputs"])
@pytest.mark.parametrize("together", [False, True])
def test_scalars_and_tangents_agree(name, together, monkeypatch):
    """The interaction's joint change is that of forward accumulators."""
    monkeypatch.setattr(retrain, "MOST_DIRECTIONS", 1 if together else 1024)
    model = by_name(name).model()
    data = class_data(model, 6)
    steps = with_random_steps(model, 0.1)
    assert all((len(step.theta["step"]) > 1) == together for step in steps if step.unit == 0)
    estimator = estimator_of(model, "sparse_categorical_crossentropy")
    joint = estimator.joint_change(steps, data)
    assert estimator.interaction(steps, data).change() == pytest.approx(joint, rel=1e-3, abs=1e-5)


def linear_model(outputs=2):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(outputs, name="out")])
    return tfgrow.convert(model)


def test_a_linear_model_is_settled_at_its_least_squares():
    model = linear_model()
    x, y = regression_data(model, 40)
    estimator = estimator_of(model)
    before = estimator.loss((x, y))
    inputs = np.concatenate([np.asarray(x), np.ones((40, 1))], axis=1)
    rest = y - inputs @ np.linalg.lstsq(inputs, np.asarray(y), rcond=None)[0]
    best = float(np.mean(rest**2)) - before
    done = sum(estimator.settle((x, y), (x, y)) for _ in range(3))
    assert 1.001 * best <= done <= 0.9 * best < 0
    assert estimator.loss((x, y)) == pytest.approx(before + done, rel=1e-4)


def test_settling_leaves_the_model_alone():
    model = valid_convolutions()
    data = regression_data(model, 10)
    weights = model.get_weights()
    assert estimator_of(model).settle(data, data) < 0
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def half_trained():
    """'hidden' gives what the targets are made of; 'out' does not use it yet."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, activation="relu", name="hidden"),
            layers.Dense(2, name="out"),
        ]
    )
    randomize(model)
    model = tfgrow.convert(model)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype("float32")
    features = np.asarray(layers.ReLU()(model.get_layer("hidden")(x)))
    y = features @ rng.normal(size=(4, 2)).astype("float32")
    model.get_layer("out").kernel.assign(0.3 * np.asarray(model.get_layer("out").kernel))
    return model, (x, y)


def copies_of_units(model):
    """New units that read what the old ones read."""
    kernel = np.asarray(model.get_layer("hidden").kernel)
    bias = np.asarray(model.get_layer("hidden").bias)
    return [
        c.replace(theta={**c.theta, "kernel": kernel[:, c.unit], "bias": bias[c.unit]})
        for c in tfgrow.candidates(model, "add", sites="hidden", new_units=4)
    ]


def test_a_copy_of_a_unit_brings_nothing_beyond_what_training_would():
    model, data = half_trained()
    copies = copies_of_units(model)
    raw = estimator_of(model)
    before = raw.score(raw.learn(copies, data, steps=0), data)
    settled = estimator_of(model)
    for _ in range(3):
        settled.settle(data, data)
    after = settled.score(settled.learn(copies, data, steps=0), data)
    assert np.all(before < 0)
    assert np.abs(after).max() < 0.03 * np.abs(before).max()


def test_what_only_a_new_unit_can_do_stays_when_the_weights_are_settled():
    """The targets hold a feature that no unit has."""
    model, (x, y) = half_trained()
    new = np.maximum(x @ np.array([[1.0], [-1.0], [0.5]], "float32"), 0.0)
    y = y + 2.0 * new @ np.array([[1.0, -1.0]], "float32")
    (copy, *_), (fresh, *_) = copies_of_units(model), tfgrow.candidates(model, "add")
    direction = np.array([1.0, -1.0, 0.5], "float32")
    fresh = fresh.replace(
        theta={**fresh.theta, "kernel": direction, "bias": 0.0 * fresh.theta["bias"]}, unit=9
    )
    estimator = estimator_of(model)
    for _ in range(3):
        estimator.settle((x, y), (x, y))
    learned = estimator.learn([copy, fresh], (x, y), steps=0)
    of_copy, of_new = estimator.score(learned, (x, y))
    assert of_new < 0
    assert abs(of_copy) < 0.2 * abs(of_new)


def test_checks_of_a_settled_score_start_from_the_settled_loss():
    """New units that hardly do anything are corrected by hardly anything."""
    model, data = half_trained()
    estimator = estimator_of(model)
    assert estimator.settle(data, data) < -0.1
    tiny = [
        get("add").scaled(c, 1e-3) for c in estimator.learn(copies_of_units(model), data, steps=0)
    ]
    checked = estimator.score(tiny, data, checks=4)
    np.testing.assert_allclose(checked, estimator.score(tiny, data), atol=1e-3)


def test_frozen_layers_and_wide_ones_are_left_out(monkeypatch):
    model = valid_convolutions()
    model.get_layer("conv1").trainable = False
    names = {c.site.name for c in retraining(model, trace(model))}
    assert names == {"conv2", "out"}
    monkeypatch.setattr(retrain, "MOST_INPUTS", 27)
    assert {c.site.name for c in retraining(model, trace(model))} == {"out"}
    monkeypatch.setattr(retrain, "MOST_INPUTS", 1)
    data = regression_data(model, 10)
    assert estimator_of(model).settle(data, data) == 0.0


def test_it_is_no_edit():
    assert "retrain" not in MORPHISMS
    assert get("retrain").name == "retrain"
    model = linear_model()
    with pytest.raises(ValueError, match="Unknown morphism 'retraining'"):
        tfgrow.candidates(model, "retraining")
