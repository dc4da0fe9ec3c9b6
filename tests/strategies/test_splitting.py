"""Splitting steepest descent: the paper's matrices in closed form, and what splits really do."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfgrow
from tests.cases import by_name, regression_data
from tfgrow.capture.batches import batches_of
from tfgrow.oracle.data import GrowthData
from tfgrow.strategies import Splitting
from tfgrow.strategies import get as strategy
from tfgrow.strategies.splitting import Splits

SAMPLES = 200


def net(*widths, activation="softplus", seed=0):
    """Units that differ in size, so that an order by gain is not one by eigenvalue."""
    keras.utils.set_random_seed(seed)
    inputs = x = keras.Input((3,))
    for number, width in enumerate(widths):
        x = layers.Dense(width, activation, name=f"hidden{number}")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    rng = np.random.default_rng(seed)
    for layer in model.layers[1:]:
        layer.bias.assign(0.3 * rng.standard_normal(layer.bias.shape))
    model.get_layer("hidden0").kernel.assign(
        rng.standard_normal((3, widths[0])) * rng.uniform(0.3, 2.0, widths[0])
    )
    model.compile("sgd", "mse")
    return model


def one_batch(data):
    """The very same samples to learn on, to score with, and to judge by."""
    (batch,) = batches_of(data, len(data[0]))
    return GrowthData([batch], [batch], [batch])


def splitting_matrices(model, x, y):
    """`S_i = mean_n dloss/dsigma_i softplus''(w_i x_n + b_i) x~ x~'`, `[units, 4, 4]`."""
    hidden, out = model.get_layer("hidden0"), model.get_layer("out")
    (w, b), (v, c) = hidden.get_weights(), out.get_weights()
    x = x.astype("float64")
    u = x @ w + b
    errors = np.log1p(np.exp(u)) @ v + c - y  # the mean over two outputs, each with a factor 2
    deltas = errors @ v.T
    logistic = 1 / (1 + np.exp(-u))
    extended = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    weights = deltas * logistic * (1 - logistic) / len(x)
    return np.einsum("ni,na,nb->iab", weights, extended, extended)


def theta_of(candidate):
    return np.append(candidate.theta["kernel"], candidate.theta["bias"]).astype("float64")


@pytest.fixture(scope="module")
def model():
    return net(6)


@pytest.fixture(scope="module")
def data(model):
    return regression_data(model, SAMPLES)


def test_directions_are_the_lowest_eigenvectors_of_the_papers_matrices(model, data):
    values, vectors = np.linalg.eigh(splitting_matrices(model, *data))
    splits = Splits(model, tfgrow.candidates(model, "split"), step=0.02)
    directions = splits.steepest(data, iterations=300)
    found = splits.along(directions)
    np.testing.assert_allclose(splits.curvatures(directions, data), values[:, 0], rtol=0.02)
    for candidate in found:
        theta = theta_of(candidate)
        alignment = theta @ vectors[candidate.unit, :, 0] / np.linalg.norm(theta)
        assert abs(alignment) > 0.99
        kernel = model.get_layer("hidden0").kernel.numpy()[:, candidate.unit]
        size = 0.02 * np.sqrt(np.mean(kernel**2)) * np.sqrt(theta.size)
        np.testing.assert_allclose(np.linalg.norm(theta), size, rtol=1e-4)


def test_units_are_split_in_the_order_of_their_eigenvalues(model, data):
    values = np.linalg.eigvalsh(splitting_matrices(model, *data))[:, 0]
    best = [unit for unit in np.argsort(values) if values[unit] < 0]
    assert 3 < len(best) < 6
    for count in (1, 3, 6):
        oracle = Splitting(step=0.02, iterations=300, growth_per_step=count)
        plan = oracle.propose_plan(model, one_batch(data))
        assert [c.unit for c in plan.candidates] == best[:count]


def test_few_data_are_looked_at_as_a_whole(model):
    """Of products of noisy matrices, other directions come out than of their mean."""
    oracle = Splitting(step=0.02, iterations=300, growth_per_step=3, seed=0)
    parts = oracle.split(regression_data(model, 60))
    assert len(parts.learn) > 8
    x, y = (np.concatenate([batch[number] for batch in parts.learn]) for number in (0, 1))
    values = np.linalg.eigvalsh(splitting_matrices(model, x, y))[:, 0]
    plan = oracle.propose_plan(model, parts)
    assert [c.unit for c in plan.candidates] == np.argsort(values)[:3].tolist()
    splits = Splits(model, plan.candidates, step=0.02)
    directions = [tf.constant(np.stack([theta_of(c) for c in plan.candidates]), tf.float32)]
    np.testing.assert_allclose(
        splits.curvatures(directions, (x, y)), np.sort(values)[:3], rtol=0.02
    )


def test_only_units_of_negative_eigenvalues_are_split(data):
    """Where more of what a unit hands on lowers the loss, splits help; where less does, none."""
    x, y = data
    model = net(4)
    kernel = np.abs(model.get_layer("out").kernel.numpy())
    kernel[2:] *= -1
    model.get_layer("out").kernel.assign(kernel)
    far = np.full_like(y, 30.0)  # above all that the model gives: units 0 and 1 should give more
    values = np.linalg.eigvalsh(splitting_matrices(model, x, far))
    assert (values[:2] < 0).all()
    assert (values[2:] > 0).all()
    plan = Splitting(growth_per_step=4).propose_plan(model, one_batch((x, far)))
    assert {c.unit for c in plan.candidates} == {0, 1}
    model.get_layer("out").kernel.assign(-np.abs(kernel))
    plan = Splitting(growth_per_step=4).propose_plan(model, one_batch((x, far)))
    assert not plan.candidates
    assert plan.reason == "no unit that lowers the loss fits the budget"


def test_the_real_loss_changes_by_half_the_eigenvalue_times_the_square_of_the_step(model, data):
    splits = Splits(model, tfgrow.candidates(model, "split"), step=0.05)
    directions = splits.steepest(data, iterations=100)
    promised = splits.curvatures(directions, data)
    for candidate, value in zip(splits.along(directions), promised, strict=True):
        change = tfgrow.measure_change(model, candidate, data)
        expected = 0.5 * value * np.sum(theta_of(candidate) ** 2)
        np.testing.assert_allclose(change, expected, rtol=0.03)


def test_the_estimate_of_a_step_is_what_it_really_does(model, data):
    plan = Splitting(step=0.05, growth_per_step=4, seed=0).propose_plan(model, one_batch(data))
    assert len(plan.candidates) == 4
    change = tfgrow.measure_change(model, plan.candidates, data)
    np.testing.assert_allclose(plan.estimated_change, change, rtol=0.1)


def test_no_random_direction_is_better(model, data):
    """Of equal length, and so many that chance comes close."""
    splits = Splits(model, tfgrow.candidates(model, "split", seed=1), step=0.05)
    best = splits.curvatures(splits.steepest(data, iterations=100), data)
    tried = [
        Splits(model, tfgrow.candidates(model, "split", seed=seed), step=0.05) for seed in range(8)
    ]
    chance = [each.curvatures(each.steepest(data, iterations=0), data) for each in tried]
    assert (best < np.min(chance, axis=0)).all()


def test_the_order_of_the_candidates_does_not_matter():
    model = net(4, 3)
    data = regression_data(model, SAMPLES)
    every = tfgrow.candidates(model, "split")
    mixed = every[::2] + every[1::2]
    values = {}
    for order in (every, mixed):
        splits = Splits(model, order, step=0.05)
        directions = splits.steepest(data, iterations=20)
        pairs = zip(splits.along(directions), splits.curvatures(directions, data), strict=True)
        assert [one.key for one in splits.along(directions)] == [one.key for one in order]
        for one, value in pairs:
            known, theta = values.setdefault(one.key, (value, theta_of(one)))
            np.testing.assert_allclose(value, known, rtol=1e-3)
            np.testing.assert_allclose(theta_of(one), theta, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("case", ["bn_after_activation", "residual_stream", "dilated_no_bias"])
def test_products_are_those_of_one_matrix_whatever_the_site(case):
    """The quotient of the gradient, and twice the first-order change, are both v'S v."""
    model = by_name(case).model()
    model.compile("sgd", "mse")
    data = regression_data(model, 32)
    splits = Splits(model, tfgrow.candidates(model, "split"), step=0.05)
    directions = splits.steepest(data, iterations=5)
    found = splits.along(directions)
    squares = [sum(np.sum(value**2) for value in c.theta.values()) for c in found]
    changes = tfgrow.GaussNewtonEstimator(model, curvature="none").score(found, data)
    promised = 0.5 * splits.curvatures(directions, data) * squares
    np.testing.assert_allclose(promised, changes, rtol=0.1, atol=0.02 * np.abs(changes).max())


def test_of_relu_the_step_smooths_the_kink():
    """No second derivative anywhere, yet the estimate of first order is what really happens."""
    model = net(6, activation="relu")
    data = regression_data(model, 2000)
    plan = Splitting(step=0.2, growth_per_step=1, seed=0).propose_plan(model, one_batch(data))
    change = tfgrow.measure_change(model, plan.candidates, data)
    assert change < 0
    np.testing.assert_allclose(plan.estimated_change, change, rtol=0.1)


def test_equal_seeds_give_equal_plans(model, data):
    first, second = (Splitting(growth_per_step=3, seed=4).propose_plan(model, data) for _ in "12")
    assert first.estimated_change == second.estimated_change
    for one, other in zip(first.candidates, second.candidates, strict=True):
        assert one.key == other.key
        for name, value in one.theta.items():
            np.testing.assert_array_equal(value, other.theta[name])


def test_arguments():
    assert isinstance(strategy("splitting", step=0.2), Splitting)
    with pytest.raises(ValueError, match=r"step must be a finite number > 0\. Found: 0"):
        Splitting(step=0)
    with pytest.raises(ValueError, match="iterations must be a whole number"):
        Splitting(iterations=0)
    stock = keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.Dense(1)])
    model = tfgrow.convert(stock)
    with pytest.raises(ValueError, match="is not compiled with a loss"):
        Splitting().check(model, regression_data(model, 8))
