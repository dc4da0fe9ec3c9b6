"""Firefly descent: gates, training and choice against over-grown networks that are really built."""

import copy

import keras
import numpy as np
import pytest
from keras import layers

import tfgrow
from tests.cases import regression_data
from tfgrow.capture.batches import batches_of
from tfgrow.oracle.data import GrowthData
from tfgrow.strategies import Firefly
from tfgrow.strategies import get as strategy
from tfgrow.strategies.firefly import OverGrown

SAMPLES = 200
KINDS = ("split", "add")


def net(*widths, seed=0):
    keras.utils.set_random_seed(seed)
    inputs = x = keras.Input((3,))
    for number, width in enumerate(widths):
        x = layers.Dense(width, "softplus", name=f"hidden{number}")(x)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    rng = np.random.default_rng(seed)
    for layer in model.layers[1:]:
        layer.bias.assign(0.3 * rng.standard_normal(layer.bias.shape))
    model.compile("sgd", "mse")
    return model


def one_batch(data):
    """The very same samples to learn on, to score with, and to judge by."""
    (batch,) = batches_of(data, len(data[0]))
    return GrowthData([batch], [batch], [batch])


def trained(model, data, epsilon=0.1, steps=16, seed=0):
    """Splits of all units and two new units per site, after descent."""
    every = tfgrow.candidates(model, KINDS, new_units=2, seed=seed)
    return OverGrown(model, every).trained(data, epsilon, steps, learning_rate=0.2)


def random_outgoing(candidates, size=0.3, seed=0):
    """The candidates with outgoing weights at random where they have any."""
    rng = np.random.default_rng(seed)
    return [
        one.replace(
            theta={
                name: size * rng.standard_normal(value.shape).astype("float32")
                if name.startswith("phi")
                else value
                for name, value in one.theta.items()
            }
        )
        for one in candidates
    ]


def softplus(values):
    return np.log1p(np.exp(values))


def gated_loss(model, candidates, gates, x, y):
    """The loss of the over-grown network, written out: half-open splits are of three units."""
    (w, b), (v, c) = model.get_layer("hidden0").get_weights(), model.get_layer("out").get_weights()
    x = x.astype("float64")
    u = x @ w + b
    outputs = softplus(u) @ v + c
    for one, gate in zip(candidates, gates, strict=True):
        response = x @ one.theta["kernel"] + one.theta["bias"]
        if one.morphism == "add":
            outputs += gate * softplus(response)[:, None] * one.theta["phi/0"].reshape(-1)
            continue
        now = u[:, one.unit]
        halves = 0.5 * (softplus(now + response) + softplus(now - response)) - softplus(now)
        outputs += gate * halves[:, None] * v[one.unit]
    return np.mean((outputs - y) ** 2)


@pytest.fixture(scope="module")
def model():
    return net(4)


@pytest.fixture(scope="module")
def data(model):
    return regression_data(model, SAMPLES)


@pytest.fixture(scope="module")
def candidates(model):
    """As before training, but with something for new units to hand on; the kinds in a mix."""
    every = random_outgoing(tfgrow.candidates(model, KINDS, new_units=2))
    return every[::2] + every[1::2]


def test_the_written_out_network_is_the_really_built_one(model, data, candidates):
    count = len(candidates)
    before, after = (gated_loss(model, candidates, np.full(count, g), *data) for g in (0.0, 1.0))
    change = tfgrow.measure_change(model, candidates, data)
    np.testing.assert_allclose(after - before, change, rtol=1e-4)
    np.testing.assert_allclose(OverGrown(model, candidates).change(data), change, rtol=1e-4)


def test_gate_gradients_are_those_of_the_over_grown_network(model, data, candidates):
    """Finite differences in the gates at the points 1/6, 1/2 and 5/6 of the way."""
    count, h = len(candidates), 1e-4

    def difference(level, row):
        ahead, behind = (np.full(count, level) for _ in "12")
        ahead[row] += h
        behind[row] -= h
        losses = [gated_loss(model, candidates, gates, *data) for gates in (ahead, behind)]
        return (losses[0] - losses[1]) / (2 * h)

    expected = [
        np.mean([difference(level, row) for level in (1 / 6, 1 / 2, 5 / 6)]) for row in range(count)
    ]
    slopes = OverGrown(model, candidates).slopes(data, points=3)
    np.testing.assert_allclose(slopes, expected, rtol=1e-3, atol=1e-5)


def test_all_gates_together_tell_the_whole_change(model, data, candidates):
    slopes = OverGrown(model, candidates).slopes(data, points=8)
    change = tfgrow.measure_change(model, candidates, data)
    np.testing.assert_allclose(slopes.sum(), change, rtol=0.01)


def test_training_lowers_the_true_loss_of_the_over_grown_network():
    model = net(4, 3)
    data = regression_data(model, SAMPLES)
    changes = [
        tfgrow.measure_change(model, trained(model, data, steps=steps), data)
        for steps in (1, 4, 16)
    ]
    assert 0 > changes[0] > changes[1] > changes[2]


def test_what_is_grown_stays_within_its_bounds(model, data):
    out = model.get_layer("out").kernel.numpy()
    kernel = model.get_layer("hidden0").kernel.numpy()
    for one in trained(model, data, epsilon=0.05, steps=30):
        if one.morphism == "split":
            size = np.append(one.theta["kernel"], one.theta["bias"])
            usual = np.sqrt(np.mean(kernel[:, one.unit] ** 2))
        else:
            size, usual = one.theta["phi/0"], np.sqrt(np.mean(out**2))
        assert 0 < np.sqrt(np.mean(size**2)) <= 1.001 * 0.05 * usual


def test_the_old_weights_stay_as_they_are(model, data):
    before = model.get_weights()
    Firefly(growth_per_step=2).propose_plan(model, data)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_of_two_units_the_one_whose_halves_the_target_shows_is_split():
    """Unit 0 of the target is two that lie apart; unit 1 is as it should be."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 2)).astype("float32")
    inputs = keras.Input((2,))
    hidden = layers.Dense(2, "softplus", name="hidden")(inputs)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(1, name="out")(hidden)))
    model.compile("sgd", "mse")
    model.get_layer("hidden").set_weights([np.eye(2), np.zeros(2)])
    model.get_layer("out").set_weights([np.ones((2, 1)), np.zeros(1)])
    for better in (0, 1):
        u = x[:, better]
        halves = 0.5 * (softplus(u + 1.0) + softplus(u - 1.0))
        y = (halves + softplus(x[:, 1 - better]))[:, None]
        oracle = Firefly(new_units=0, growth_per_step=1, seed=0)
        (chosen,) = oracle.propose_plan(model, one_batch((x, y))).candidates
        assert (chosen.morphism, chosen.unit) == ("split", better)
        every = OverGrown(model, tfgrow.candidates(model, "split")).trained((x, y), 0.1, 16, 0.2)
        alone = [tfgrow.measure_change(model, one, (x, y)) for one in every]
        assert np.argmin(alone) == better


def test_the_lowest_gates_are_kept_in_their_order(model, data):
    oracle = Firefly(growth_per_step=99, seed=0)
    every = tfgrow.candidates(model, KINDS, new_units=4, seed=copy.deepcopy(oracle).next_seed())
    every = OverGrown(model, every).trained(data, 0.1, 16, 0.2)
    slopes = OverGrown(model, every).slopes(data, points=3)
    best = [every[row].key for row in np.argsort(slopes) if slopes[row] < 0]
    assert len(best) > 4
    for count in (1, 4, 99):
        oracle = Firefly(growth_per_step=count, seed=0)
        plan = oracle.propose_plan(model, one_batch(data))
        assert [one.key for one in plan.candidates] == best[:count]


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_a_step_lowers_the_loss_on_samples_it_has_not_seen(model, epsilon):
    teacher = net(8, seed=7)
    x = np.random.default_rng(1).standard_normal((1200, 3)).astype("float32")
    y = teacher(x).numpy()
    seen, held_out = (x[:600], y[:600]), (x[600:], y[600:])
    plan = Firefly(epsilon=epsilon, growth_per_step=3, seed=0).propose_plan(model, seen)
    change = tfgrow.measure_change(model, plan.candidates, held_out)
    assert change < 0
    np.testing.assert_allclose(plan.estimated_change, change, rtol=0.5)


def test_the_estimate_of_a_step_is_what_it_really_does():
    """Up to the interplay of two layers, of the order of epsilon squared."""
    model = net(4, 3)
    data = regression_data(model, SAMPLES)
    plan = Firefly(epsilon=0.02, growth_per_step=8, seed=0).propose_plan(model, one_batch(data))
    assert len({one.site.name for one in plan.candidates}) == 2
    change = tfgrow.measure_change(model, plan.candidates, data)
    np.testing.assert_allclose(plan.estimated_change, change, rtol=0.05)


def test_equal_seeds_give_equal_plans(model, data):
    first, second, third = (
        Firefly(growth_per_step=3, steps=4, seed=seed).propose_plan(model, data)
        for seed in (4, 4, 5)
    )
    assert first.estimated_change == second.estimated_change != third.estimated_change
    for one, other in zip(first.candidates, second.candidates, strict=True):
        assert one.key == other.key
        for name, value in one.theta.items():
            np.testing.assert_array_equal(value, other.theta[name])


def test_arguments():
    assert isinstance(strategy("firefly", epsilon=0.2), Firefly)
    with pytest.raises(ValueError, match="epsilon must be a finite number > 0"):
        Firefly(epsilon=0)
    with pytest.raises(ValueError, match="learning_rate must be a finite number > 0"):
        Firefly(learning_rate=float("inf"))
    for name in ("steps", "points"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number >= 1"):
            Firefly(**{name: 0})
    with pytest.raises(ValueError, match="new_units must be a whole number >= 0"):
        Firefly(new_units=-1)
