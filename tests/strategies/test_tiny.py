"""TINY against its closed form in numpy, and against the loss of the network that really grew."""

import keras
import numpy as np
import pytest
from keras import layers

import tfgrow
from tests.cases import by_name, regression_data
from tests.strategies.linear import (
    EVERY_CASE,
    all_of,
    gaussian_data,
    loss_gradient,
    pooled,
    two_layers,
)
from tfgrow.strategies import Tiny, linear_units, tiny
from tfgrow.strategies.tiny import scaled


def closed_form(model, data, use_bias):
    """S, and the SVD of S^-1/2 N, of a linear network: section 3 of the paper, by numpy alone."""
    x = data[0].astype("float64")
    ones = np.ones((len(x), 1))
    hidden = x @ model.get_layer("hidden").kernel.numpy() + model.get_layer("hidden").bias.numpy()
    inputs = np.concatenate([hidden, ones], axis=1) if use_bias else hidden
    wanted = -loss_gradient(model, data)
    beyond = wanted - inputs @ np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    seen = np.concatenate([x, ones], axis=1)
    second = seen.T @ seen / len(x)
    values, vectors = np.linalg.eigh(second)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    return root, *np.linalg.svd(root @ seen.T @ beyond / len(x))


@pytest.mark.parametrize("use_bias", [True, False])
def test_units_are_those_of_the_closed_form(use_bias):
    model, data = two_layers(units=2, use_bias=use_bias), gaussian_data()
    plan = Tiny(growth_per_step=2, damping=0.0).propose_plan(model, all_of(data, 24))
    assert len(plan.candidates) == 2
    root, left, values, right = closed_form(model, data, use_bias)
    amplitudes = []
    for number, candidate in enumerate(plan.candidates):
        incoming = np.append(candidate.theta["kernel"], candidate.theta["bias"])
        outgoing = candidate.theta["phi/0"].reshape(-1)
        unit = values[number] * np.outer(root @ left[:, number], right[number])
        found = np.outer(incoming, outgoing)
        amplitudes.append(np.sum(found * unit) / np.sum(unit**2))
        np.testing.assert_allclose(
            found, amplitudes[-1] * unit, atol=1e-3 * amplitudes[-1] * np.abs(unit).max()
        )
        # the amplitude is shared by both ends
        ends = np.linalg.norm(root @ left[:, number]) / np.linalg.norm(right[number])
        np.testing.assert_allclose(
            np.linalg.norm(incoming) / np.linalg.norm(outgoing), ends, rtol=1e-3
        )
    np.testing.assert_allclose(amplitudes[0], amplitudes[1], rtol=1e-3)
    np.testing.assert_allclose(np.log2(amplitudes[0]), np.round(np.log2(amplitudes[0])), atol=1e-2)


def test_what_the_layer_can_do_itself_needs_no_unit():
    model, data = two_layers("relu"), gaussian_data()
    hidden = model.get_layer("hidden")(data[0]).numpy()
    rng = np.random.default_rng(1)
    reachable = hidden @ rng.standard_normal((4, 3)) + rng.standard_normal(3)
    oracle = Tiny(growth_per_step=2)
    plan = oracle.propose_plan(model, all_of((data[0], reachable.astype("float32"))))
    assert not plan.candidates
    assert "no new unit would gain anything" in plan.reason
    assert oracle.propose_plan(model, all_of(data)).candidates


def test_a_linear_layer_needs_no_more_units_than_it_has_inputs():
    """As many linear units as inputs can do all that any number of them can."""
    inputs = keras.Input((3,))
    x = layers.Dense(3, name="hidden")(inputs)
    model = tfgrow.convert(keras.Model(inputs, layers.Dense(2, name="out")(x)))
    model.compile("sgd", "mse")
    plan = Tiny(growth_per_step=2).propose_plan(model, all_of(gaussian_data(32, 3, 2)))
    assert not plan.candidates


@pytest.mark.parametrize("case", EVERY_CASE)
def test_the_loss_falls(case):
    """BatchNormalization, pooling, several consumers, residual streams..."""
    model = by_name(case).model()
    model.compile("sgd", "mse")
    data = regression_data(model, 24)
    plan = Tiny(growth_per_step=0.5).propose_plan(model, all_of(data))
    if not plan.candidates:
        assert plan.reason.count("would not be silent") == len(by_name(case).sites)
        return
    assert plan.estimated_change is None
    change = tfgrow.measure_change(model, plan.candidates, data)
    assert change < 0
    for factor in (0.5, 2.0):
        other = [scaled(candidate, factor) for candidate in plan.candidates]
        assert tfgrow.measure_change(model, other, data) >= change - 1e-6


def test_behind_a_batch_normalization_units_do_what_is_wanted():
    """With a linear path it makes no difference whether the layer is there."""
    changes = []
    for norm in (False, True):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5,))
        x = layers.Dense(2, use_bias=False, name="hidden")(inputs)
        x = layers.BatchNormalization(name="bn")(x) if norm else x
        model = tfgrow.convert(keras.Model(inputs, layers.Dense(3, name="out")(x)))
        model.compile("sgd", "mse")
        x, y = gaussian_data()
        data = x - x.mean(axis=0), y
        plan = Tiny(growth_per_step=1, damping=0.0).propose_plan(model, all_of(data))
        assert len(plan.candidates) == 1
        changes.append(tfgrow.measure_change(model, plan.candidates, data))
    assert changes[0] < 0
    np.testing.assert_allclose(changes[1], changes[0], rtol=2e-2)


def test_of_a_unit_and_its_mirror_image_the_better_one_is_taken():
    model, data = two_layers("relu"), gaussian_data()
    plan = Tiny(growth_per_step=2).propose_plan(model, all_of(data))
    assert len(plan.candidates) == 2
    for candidate in plan.candidates:
        little = scaled(candidate, 1e-3)
        mirror = little.replace(theta={name: -value for name, value in little.theta.items()})
        changes = [tfgrow.measure_change(model, one, data) for one in (little, mirror)]
        assert changes[0] < 0
        assert changes[0] < changes[1]


def test_a_consumer_with_too_many_inputs_is_left_out(monkeypatch):
    monkeypatch.setattr(tiny, "MOST_WEIGHTS", 3)
    model, data = two_layers("relu"), gaussian_data()
    plan = Tiny(growth_per_step=3).propose_plan(model, data)
    assert not plan.candidates
    assert "'out', which reads 'hidden', has 4 inputs" in plan.reason


def test_a_budget_is_kept():
    model, data = two_layers("relu"), gaussian_data()
    most = model.count_params() + 20  # a unit has 5 + 1 + 3
    plan = Tiny(max_params=most, growth_per_step=None).propose_plan(model, data)
    assert plan.widths == {"hidden": (4, 6)}


def test_large_batches_are_cut(monkeypatch):
    model = tfgrow.convert(pooled())
    model.compile("sgd", "mse")
    oracle = Tiny(growth_per_step=1, include="first")
    data = all_of(regression_data(model, 12))
    (whole,) = oracle.propose_plan(model, data).candidates
    monkeypatch.setattr(linear_units, "MOST_VALUES", 4000)
    (cut,) = oracle.propose_plan(model, data).candidates
    for name, value in whole.theta.items():
        np.testing.assert_allclose(cut.theta[name], value, rtol=1e-2, atol=1e-3)


def test_a_fit_by_name():
    keras.utils.set_random_seed(0)
    model, data = two_layers("relu", units=2), gaussian_data(256)
    growth = tfgrow.callbacks.Growth("tiny", data=data, every=1)
    model.fit(*data, epochs=3, verbose=0, callbacks=[growth])
    assert [event.status for event in growth.events] == ["applied", "applied"]
    for event in growth.events:
        assert event.estimated_change is None
        assert event.measured_change < 0.1 * event.loss_before
        assert event.params_after > event.params_before


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="damping must be"):
        Tiny(damping=-1.0)
