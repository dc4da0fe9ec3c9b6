"""GradMax against its closed form, and the gradient that it promises against the tape."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfgrow
from tests.cases import by_name, regression_data
from tests.morphisms.effects import applied, outputs
from tests.strategies.linear import (
    EVERY_CASE,
    all_of,
    gaussian_data,
    loss_gradient,
    pooled,
    two_layers,
)
from tfgrow.morphisms.registry import candidates as make_candidates
from tfgrow.oracle.limits import Limits
from tfgrow.strategies import GradMax, linear_units
from tfgrow.strategies.base import Room
from tfgrow.strategies.gradmax import mean_gradients, outgoing_norm
from tfgrow.strategies.linear_units import LinearUnits


def matrix_of(model, data, site, biases=False):
    """M of one site, and its units as vectors."""
    (like,) = make_candidates(model, "add", site, new_units=1)
    units = LinearUnits(like, biases)
    room = Room(model, {site: like.site}, None, Limits(), 0, all_of(data))
    (matrix,) = mean_gradients(room, [units])
    return matrix, units


def kernel_gradients(model, data, layer, training=False):
    """Of the mean loss, by tape."""
    x, y = data
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x, training=training) - y))
    return tape.gradient(loss, model.get_layer(layer).kernel.value).numpy()


@pytest.mark.parametrize(("activation", "slope"), [(None, 1.0), ("relu", 0.5), ("tanh", 1.0)])
def test_m_is_the_outer_product_of_inputs_and_gradients(activation, slope):
    model, data = two_layers(activation), gaussian_data()
    matrix, _ = matrix_of(model, data, "hidden", biases=True)
    seen = np.concatenate([np.ones((64, 1)), data[0]], axis=1)
    expected = slope * seen.T @ loss_gradient(model, data) / 64
    names = list(model.get_layer("hidden").growable_variables())
    order = [*range(1, 6), 0] if names == ["kernel", "bias"] else range(6)
    np.testing.assert_allclose(matrix, expected[list(order)], rtol=2e-3, atol=2e-5)


def test_outgoing_weights_are_the_first_singular_vectors():
    model, data = two_layers("relu"), gaussian_data()
    plan = GradMax(growth_per_step=2).propose_plan(model, all_of(data))
    incoming, _, outgoing = np.linalg.svd(data[0].T @ loss_gradient(model, data))
    norm = np.linalg.norm(model.get_layer("out").kernel.numpy(), axis=1).mean()
    size = 1e-3 * np.sqrt(np.mean(model.get_layer("hidden").kernel.numpy() ** 2) * 5)
    assert len(plan.candidates) == 2
    for number, candidate in enumerate(plan.candidates):
        phi = candidate.theta["phi/0"].reshape(-1)
        sign = np.sign(phi @ outgoing[number])
        np.testing.assert_allclose(phi, sign * norm * outgoing[number], rtol=1e-3, atol=1e-4)
        kernel = candidate.theta["kernel"]
        first_step = -sign * incoming[:, number] * size
        np.testing.assert_allclose(kernel, first_step, rtol=1e-2, atol=1e-2 * size)
        assert not candidate.theta["bias"].any()


def test_the_gradient_is_that_of_the_singular_values_and_the_largest_there_is():
    model, data = two_layers(), gaussian_data()
    plan = GradMax(growth_per_step=2, tiny=1e-6).propose_plan(model, all_of(data))
    grown = applied(model, plan.candidates)
    found = np.linalg.norm(kernel_gradients(grown, data, "hidden")[:, 4:])
    matrix = data[0].T @ loss_gradient(model, data) / 64
    norm = np.linalg.norm(model.get_layer("out").kernel.numpy(), axis=1).mean()
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(found, norm * np.sqrt(np.sum(values[:2] ** 2)), rtol=1e-4)

    rng = np.random.default_rng(0)
    for _ in range(200):
        single = rng.standard_normal(3)
        single *= norm / np.linalg.norm(single)
        assert np.linalg.norm(matrix @ single) <= norm * values[0]
        pair, _ = np.linalg.qr(rng.standard_normal((3, 2)))
        assert np.linalg.norm(norm * matrix @ pair) <= found * (1 + 1e-5)
    # and really so in the network, not only in the formula
    other = [
        candidate.replace(theta={**candidate.theta, "phi/0": (norm * column).reshape(1, 1, 3)})
        for candidate, column in zip(plan.candidates, pair.T.astype("float32"), strict=True)
    ]
    theirs = kernel_gradients(applied(model, other), data, "hidden")[:, 4:]
    np.testing.assert_allclose(np.linalg.norm(theirs), np.linalg.norm(norm * matrix @ pair), 1e-4)


def stream():
    inputs = keras.Input((5, 5, 2))
    x = layers.Conv2D(3, 3, padding="same", name="stem")(inputs)
    y = layers.Conv2D(2, 1, name="inner")(x)
    y = layers.Conv2D(3, 3, padding="same", name="back")(y)
    x = layers.Add(name="add")([x, y])
    left = layers.GlobalAveragePooling2D(name="gap")(layers.Conv2D(2, 2, name="left")(x))
    x = layers.Dense(2, name="right")(layers.GlobalAveragePooling2D(name="gap2")(x))
    return keras.Model(inputs, layers.Add(name="sum")([left, x]))


@pytest.mark.parametrize(
    ("build", "site"),
    [(pooled, "first"), (pooled, "second"), (stream, "stem"), (stream, "inner")],
)
def test_the_promised_gradient_is_real(build, site):
    """Convolution, stride, pooling, flattening, several consumers and a residual stream."""
    model = tfgrow.convert(build())
    model.compile("sgd", "mse")
    data = regression_data(model, 12)
    plan = GradMax(growth_per_step=2, tiny=1e-6, include=site).propose_plan(model, all_of(data, 5))
    assert {candidate.site.name for candidate in plan.candidates} == {site}
    matrix, units = matrix_of(model, data, site)
    phi = [candidate.theta for candidate in plan.candidates]
    phi = [np.concatenate([v.ravel() for n, v in t.items() if n[:3] == "phi"]) for t in phi]
    promised = matrix @ np.array(phi).T
    sizes = np.linalg.norm(promised, axis=0)
    np.testing.assert_allclose(
        sizes, outgoing_norm(units.site) * np.linalg.svd(matrix)[1][:2], rtol=1e-3
    )
    grown = applied(model, plan.candidates)
    found = [
        kernel_gradients(grown, data, node.name)[..., units.site.units :].reshape(-1, 2)
        for node in units.site.producers
    ]
    if site == "stem":  # the new rows and columns of the layer that reads and makes the stream
        assert len(found) == 2
    np.testing.assert_allclose(np.concatenate(found), promised, rtol=2e-3, atol=1e-4 * sizes.max())


def normalised_net():
    inputs = keras.Input((5, 5, 2))
    x = layers.Conv2D(3, 3, use_bias=False, name="conv")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Conv2D(2, 2, name="reader")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D(name="gap")(x))


def test_behind_a_batch_normalization_the_gradient_is_that_of_training():
    model = tfgrow.convert(normalised_net())
    model.compile("sgd", "mse")
    data = regression_data(model, 16)
    data = data[0] + 1.0, data[1]  # a mean, which training takes away
    norm, response = model.get_layer("bn"), model.get_layer("conv")(data[0]).numpy()
    norm.moving_mean.assign(response.mean(axis=(0, 1, 2)))
    norm.moving_variance.assign(response.var(axis=(0, 1, 2)))
    plan = GradMax(growth_per_step=2, include="conv").propose_plan(model, all_of(data))
    grown = applied(model, plan.candidates)
    np.testing.assert_allclose(outputs(grown, data[0]), outputs(model, data[0]), atol=1e-2)
    np.testing.assert_allclose(
        np.asarray(grown(data[0], training=True)), outputs(model, data[0]), atol=1e-2
    )
    matrix, _ = matrix_of(model, data, "conv")
    phi = np.array([candidate.theta["phi/0"].ravel() for candidate in plan.candidates])
    promised = matrix @ phi.T / np.sqrt(norm.epsilon)
    found = kernel_gradients(grown, data, "conv", training=True)[..., 3:].reshape(-1, 2)
    np.testing.assert_allclose(found, promised, rtol=5e-2, atol=2e-2 * np.abs(promised).max())


@pytest.mark.parametrize("case", EVERY_CASE)
def test_the_function_is_nearly_kept(case):
    model = by_name(case).model()
    model.compile("sgd", "mse")
    data = regression_data(model, 24)
    before, changes = outputs(model, data[0]), []
    for tiny in (1e-2, 1e-3):
        plan = GradMax(growth_per_step=0.5, tiny=tiny, seed=1).propose_plan(model, all_of(data))
        if not plan.candidates:
            assert plan.reason.count("would not be silent") == len(by_name(case).sites)
            return
        changes.append(np.abs(outputs(applied(model, plan.candidates), data[0]) - before).max())
    assert 0 < changes[1] < 0.1 * before.std()
    assert changes[1] < 0.2 * changes[0]


def test_units_that_would_not_be_silent_are_left_out():
    inputs = keras.Input((5, 5, 2))
    x = layers.Conv2D(3, 3, activation="sigmoid", name="sigmoid")(inputs)
    x = layers.Conv2D(3, 2, name="normalised")(x)
    x = layers.GroupNormalization(-1, name="norm")(x)
    x = layers.Conv2D(3, 1, activation="relu", name="rectified")(x)
    x = layers.Dense(2, name="out")(layers.GlobalAveragePooling2D(name="gap")(x))
    model = tfgrow.convert(keras.Model(inputs, x))
    model.compile("sgd", "mse")
    plan = GradMax(growth_per_step=1.0).propose_plan(model, regression_data(model, 16))
    assert set(plan.widths) == {"rectified"}
    assert "'sigmoid' without incoming weights would not be silent" in plan.reason
    assert "'normalised' hands on is not linear" in plan.reason


def test_large_batches_are_cut(monkeypatch):
    model = tfgrow.convert(pooled())
    model.compile("sgd", "mse")
    data = regression_data(model, 12)
    whole, units = matrix_of(model, data, "first")
    monkeypatch.setattr(linear_units, "MOST_VALUES", 5 * units.fan_in * 36)
    np.testing.assert_allclose(matrix_of(model, data, "first")[0], whole, rtol=1e-3, atol=1e-6)


def test_sites_compete_by_gradient_per_parameter():
    data, inputs = gaussian_data(), keras.Input((5,))
    x = layers.Dense(4, "relu", name="a")(inputs)
    x = layers.Dense(4, "relu", name="b")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(3, name="out")(x)))
    model.compile("sgd", "mse")
    plan = GradMax(growth_per_step=1).propose_plan(model, all_of(data))
    worth = {}
    for site, cost in (("a", 5 + 1 + 4), ("b", 4 + 1 + 3)):
        matrix, units = matrix_of(model, data, site)
        largest = np.linalg.svd(matrix, compute_uv=False)[0]
        worth[site] = (outgoing_norm(units.site) * largest) ** 2 / cost
    assert set(plan.widths) == {max(worth, key=worth.get)}


def test_a_budget_is_kept_and_used():
    model, data = two_layers("relu"), gaussian_data()
    most = model.count_params() + 20  # a unit has 5 + 1 + 3
    plan = GradMax(max_params=most, growth_per_step=None).propose_plan(model, data)
    assert plan.widths == {"hidden": (4, 6)}
    # there is no fourth singular vector
    plan = GradMax(growth_per_step=None).propose_plan(model, data)
    assert plan.widths == {"hidden": (4, 7)}


def test_a_fit_by_name():
    model, data = two_layers("relu"), gaussian_data()
    growth = tfgrow.callbacks.Growth("gradmax", data=data, every=1)
    model.fit(*data, epochs=3, verbose=0, callbacks=[growth])
    assert [event.status for event in growth.events] == ["applied", "applied"]
    for event in growth.events:
        assert event.estimated_change is None
        assert abs(event.measured_change) < 1e-2
    # they learn: the new units' incoming weights have left zero behind
    sizes = np.linalg.norm(model.get_layer("hidden").kernel.numpy(), axis=0)
    assert sizes[4] > 2e-3 * sizes[:4].mean()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="tiny must be"):
        GradMax(tiny=0.0)
    model = tfgrow.convert(keras.Sequential([keras.Input((2,)), layers.Dense(2), layers.Dense(1)]))
    with pytest.raises(ValueError, match="not compiled with a loss"):
        GradMax().check(model, None)


def test_statistics_of_too_few_samples_are_not_trusted(monkeypatch):
    """Centred one by one, samples have nothing left in common that a mean over positions sees."""
    model = by_name("conv_bn_relu").model()
    model.compile("sgd", "mse")
    data = regression_data(model, 64)
    assert GradMax(growth_per_step=2, seed=0).propose_plan(model, all_of(data)).candidates
    monkeypatch.setattr(linear_units, "MOST_VALUES", 1000)
    plan = GradMax(growth_per_step=2, seed=0).propose_plan(model, all_of(data))
    assert not plan.candidates
    assert "too few for the statistics of its BatchNormalization" in plan.reason
