"""The running average of the weights, and BatchNormalization's statistics taken anew."""

import keras
import numpy as np
import pytest

import tfgrow
from tests.integration.fitting import (
    Blind,
    arrays,
    assert_same_bits,
    batches,
    compiled,
    convnet,
    fit,
    mlp,
    state,
)
from tfgrow.averaging import WeightAverage, refresh_statistics
from tfgrow.callbacks import Growth
from tfgrow.measure import real_loss


def walk(model, average, steps, seed=0):
    """Random weights, step by step, given to the model and taken in; returns them."""
    rng = np.random.default_rng(seed)
    taken = []
    for _ in range(steps):
        taken.append([rng.normal(size=w.shape).astype("float32") for w in model.get_weights()])
        model.set_weights(taken[-1])
        average.update(model)
    return taken


# ---- the average ---------------------------------------------------------------------------------


def test_it_begins_as_the_mean():
    model, average = mlp(), WeightAverage(0.9)
    taken = walk(model, average, 5)
    assert average.assign(model)
    for weight, values in zip(model.get_weights(), zip(*taken, strict=True), strict=True):
        np.testing.assert_allclose(weight, np.mean(values, axis=0), rtol=1e-5, atol=1e-6)


def test_it_goes_on_as_an_exponential_average():
    model, average = mlp(), WeightAverage(0.75)
    taken = walk(model, average, 9)
    expected = [np.zeros_like(value) for value in taken[0]]
    for step, values in enumerate(taken, start=1):
        share = max(0.25, 1 / step)
        expected = [e + share * (v - e) for e, v in zip(expected, values, strict=True)]
    assert average.assign(model)
    for weight, value in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(weight, value, rtol=1e-5, atol=1e-6)


def test_many_steps_at_once_count_as_many():
    model, average = mlp(), WeightAverage(0.9)
    start = walk(model, average, 50)[-1]
    model.set_weights(start)
    average.update(model, steps=100)  # at these very weights for so long
    assert average.assign(model)
    old = 0.9**100
    for weight, value in zip(model.get_weights(), start, strict=True):
        assert np.abs(weight - value).max() <= 10 * old


def test_of_many_steps_it_looks_at_some():
    """The mean of a line is the value in the middle, whichever of its points are looked at."""
    model, average = mlp(), WeightAverage(0.999)
    looks = 0
    for step in range(1000):
        model.set_weights([np.full(w.shape, float(step)) for w in model.get_weights()])
        before = average._values
        average.update(model)
        looks += average._values is not before
    assert 50 < looks < 200
    assert average.assign(model)
    for weight in model.get_weights():
        np.testing.assert_allclose(weight, 500, rtol=0.1)


def test_it_begins_anew_when_the_model_has_grown():
    model, average = mlp(), WeightAverage(0.9)
    walk(model, average, 3)
    tfgrow.widen(model, "hidden", 2)
    before = model.get_weights()
    assert not average.assign(model)
    assert_same_bits(model.get_weights(), before)
    average.update(model)
    assert average.assign(model)
    assert_same_bits(model.get_weights(), before)


def test_without_a_step_there_is_none():
    assert not WeightAverage(0.9).assign(mlp())


# ---- BatchNormalization --------------------------------------------------------------------------


def normalised(trainable=True, shared=False):
    keras.utils.set_random_seed(0)
    norm = keras.layers.BatchNormalization(name="bn", trainable=trainable)
    x = inputs = keras.Input((4,), name="x")
    x = keras.layers.Dense(3, name="hidden")(x)
    x = norm(x)
    if shared:
        x = norm(keras.layers.Dense(3, name="second")(x))
    x = keras.layers.Dropout(0.5, seed=1, name="drop")(x)
    return tfgrow.convert(keras.Model(inputs, keras.layers.Dense(3, name="out")(x)))


def test_statistics_are_the_means_over_the_batches():
    model = normalised()
    refresh_statistics(model, batches())
    kernel, bias = model.get_layer("hidden").get_weights()
    reads = [x.numpy() @ kernel + bias for x, _ in batches()]
    bn = model.get_layer("bn")
    mean, variance = (
        np.mean([take(r, axis=0) for r in reads], axis=0) for take in (np.mean, np.var)
    )
    np.testing.assert_allclose(bn.moving_mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bn.moving_variance, variance, rtol=1e-4, atol=1e-6)


def test_nothing_else_changes():
    model = normalised()
    statistics = {"moving_mean", "moving_variance"}
    before = {v.path: np.array(v) for v in model.variables}
    seeds = [np.array(v) for v in model.non_trainable_variables]
    refresh_statistics(model, batches())
    after = {v.path: np.array(v) for v in model.variables}
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert {path.rpartition("/")[2] for path in changed} == statistics
    assert len(seeds) > len(statistics)  # the seed of Dropout is among them
    assert model.get_layer("bn").momentum == 0.99


@pytest.mark.parametrize("options", [{"trainable": False}, {"shared": True}])
def test_frozen_and_shared_layers_keep_theirs(options):
    model = normalised(**options)
    before = model.get_weights()
    refresh_statistics(model, batches())
    assert_same_bits(model.get_weights(), before)


def test_the_momentum_comes_back_after_an_error():
    model = normalised()
    with pytest.raises(ValueError, match="incompatible"):
        refresh_statistics(model, [(np.zeros((2, 7), "float32"), np.zeros(2))])
    assert model.get_layer("bn").momentum == 0.99


# ---- in Growth -----------------------------------------------------------------------------------


class Noise(keras.callbacks.Callback):
    """Moves the weights at random after every step."""

    def __init__(self, size):
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.size = size

    def on_train_batch_end(self, batch, logs=None):
        self.model.set_weights(
            [
                weight + self.size * self.rng.normal(size=weight.shape).astype("float32")
                for weight in self.model.get_weights()
            ]
        )


def averaging(oracle, data=None, **options):
    """A `Growth` that looks at the average, and grows whatever that brings."""
    settings = {"every": 1, "tolerance": 100.0, "verbose": 0, "ema_momentum": 0.99}
    return Growth(oracle(seed=0), arrays() if data is None else data, **settings | options)


def settled(model, epochs=30):
    """Trained until nothing changes much, so that noise only makes it worse."""
    fit(model, [], epochs=epochs)
    model.optimizer.learning_rate = 1e-4
    return model


def test_it_grows_at_the_average_where_that_is_better():
    found = {}
    for momentum in (None, 0.99):
        model = settled(compiled(mlp(), keras.optimizers.Adam(0.05)))
        growth = averaging(Blind, ema_momentum=momentum)
        fit(model, [growth, Noise(0.3)], epochs=2)
        (found[momentum],) = growth.events
    assert found[0.99].averaged
    assert not found[None].averaged
    assert found[0.99].loss_before < found[None].loss_before


def test_it_grows_at_the_weights_as_they_are_where_those_are_better():
    """At the very start, the mean of all steps lags behind."""
    model = compiled(mlp(), keras.optimizers.Adam(0.03))
    growth = averaging(Blind)
    fit(model, [growth], epochs=2)
    assert [event.averaged for event in growth.events] == [False]


class Unwilling(Blind):
    """Never finds anything to do."""

    def propose_plan(self, model, data, *, epoch=0, **context):
        return tfgrow.types.Plan((), 0.0, tfgrow.types.Cost(), {}, {}, reason="unwilling")


@pytest.mark.parametrize(
    ("oracle", "tolerance", "status"),
    [(Unwilling, 0.0, "nothing"), (Blind, -100.0, "rejected")],
)
def test_where_nothing_is_applied_the_weights_stay_as_they_are(oracle, tolerance, status):
    histories = []
    for growing in (True, False):
        model = settled(compiled(convnet(), keras.optimizers.Adam(0.01)), epochs=3)
        growth = averaging(oracle, data=arrays(model), tolerance=tolerance)
        callbacks = [growth, Noise(0.3)] if growing else [Noise(0.3)]
        fit(model, callbacks, arrays(model), epochs=2)
        histories.append(state(model))
        if growing:
            assert [event.status for event in growth.events] == [status]
            assert not growth.events[0].averaged
    assert_same_bits(*histories)


def test_what_was_averaged_in_an_earlier_fit_is_forgotten():
    model = settled(compiled(mlp(), keras.optimizers.Adam(0.05)))
    growth = averaging(Blind)
    fit(model, [growth], epochs=1)  # due when the next fit begins
    model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
    zero = real_loss(model, growth.oracle.split(arrays()).held_out)
    fit(model, [growth], epochs=1)
    (event,) = growth.events
    assert not event.averaged
    assert event.loss_before == pytest.approx(zero, rel=1e-4)


@pytest.mark.parametrize("momentum", [1.0, -0.1, "0.9"])
def test_bad_momentum(momentum):
    with pytest.raises(ValueError, match="ema_momentum must be"):
        Growth(Blind(), arrays(), ema_momentum=momentum)


def test_fit_does_not_wait_for_the_logs_of_every_step():
    assert Growth.on_train_batch_end is keras.callbacks.Callback.on_train_batch_end
