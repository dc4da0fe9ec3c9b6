"""The measured truth: one batch computes what many traced ones do."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrow
from tfgrow.measure import real_loss


def test_one_batch_is_not_traced_and_many_give_the_same(monkeypatch):
    model = tfgrow.convert(
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "relu"), keras.layers.Dense(2)])
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 4)).astype("float32"), rng.normal(size=(12, 2)).astype("float32")
    eager = []
    layer = model.layers[-1]
    call = layer.call

    def watched(inputs, **kwargs):
        eager.append(hasattr(inputs, "numpy"))
        return call(inputs, **kwargs)

    monkeypatch.setattr(layer, "call", watched)
    at_once = real_loss(model, (x, y), "mse")
    assert eager == [True]
    in_parts = [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]
    assert real_loss(model, in_parts, "mse") == pytest.approx(at_once, rel=1e-6)
    assert set(eager[1:]) == {False}, "only traced"
    expected = np.mean((model(x) - y) ** 2)
    assert at_once == pytest.approx(float(expected), rel=1e-6)


def test_measuring_often_on_few_batches_is_no_news(caplog, rng):
    """TensorFlow warns of functions that are traced again and again; what could a user do?"""
    model = tfgrow.convert(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    x, y = rng.normal(size=(2, 12, 4)).astype("float32"), rng.normal(size=(2, 12, 2))
    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        for _ in range(8):
            real_loss(model, list(zip(x, y, strict=True)), "mse")
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["split", "add", "prune", "deepen", "skip"])
def test_in_place_measures_the_same_and_takes_it_back(kind):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, "relu", name="first")(inputs)
    hidden = keras.layers.Dense(3, "relu", name="second")(hidden)
    model = tfgrow.convert(keras.Model(inputs, keras.layers.Dense(2, name="out")(hidden)))
    model.compile("adam", "mse")
    rng = np.random.default_rng(0)
    data = rng.normal(size=(12, 4)).astype("float32"), rng.normal(size=(12, 2)).astype("float32")
    model.fit(*data, verbose=0)
    candidates = tfgrow.GaussNewtonEstimator(model).learn(
        tfgrow.candidates(model, kind)[:1], data, steps=3
    )
    before = [np.array(v) for v in (*model.variables, *model.optimizer.variables)]
    outputs = model.predict(data[0], verbose=0)
    expected = tfgrow.measure_change(model, candidates, data)
    found = tfgrow.measure_change(model, candidates, data, in_place=True)
    assert abs(expected) > 1e-5
    assert found == pytest.approx(expected, abs=1e-6)
    after = [*model.variables, *model.optimizer.variables]
    for was, now in zip(before, after, strict=True):
        np.testing.assert_array_equal(now, was)
    np.testing.assert_array_equal(model.predict(data[0], verbose=0), outputs)
    assert tfgrow.measure_change(model, candidates, data) == pytest.approx(expected, abs=1e-6)


def own_softmax(logits):
    """Whose logits are not what enters it."""
    return keras.activations.softmax(3.0 * logits)


def classifier(*head):
    body = [keras.Input((4,)), keras.layers.Dense(3, "relu")]
    return tfgrow.convert(keras.Sequential([*body, *head]))


@pytest.mark.parametrize("batches", [1, 3], ids=["at once", "traced"])
@pytest.mark.parametrize(
    ("head", "loss", "scale"),
    [
        ([("softmax", 3)], "sparse_categorical_crossentropy", 60),
        ([("sigmoid", 1)], "binary_crossentropy", 60),
        ([(None, 3), "layer"], "sparse_categorical_crossentropy", 60),
        ([(own_softmax, 3)], "sparse_categorical_crossentropy", 1),
    ],
    ids=["softmax", "sigmoid", "layer", "own"],
)
def test_samples_that_are_wrong_for_sure_count_as_in_fit(head, loss, scale, batches):
    model = classifier(
        *(
            keras.layers.Softmax() if part == "layer" else keras.layers.Dense(part[1], part[0])
            for part in head
        )
    )
    model.compile("sgd", loss)
    rng = np.random.default_rng(0)
    model.set_weights([scale * rng.normal(size=w.shape) for w in model.get_weights()])
    x = rng.normal(size=(12, 4)).astype("float32")
    y = rng.integers(0, 2, (12, 1))
    data = [(x[start::batches], y[start::batches]) for start in range(batches)]
    found = real_loss(model, data)
    assert scale == 1 or found > 100, "probabilities clipped at 1e-7 cost 16 at most"
    assert found == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)
    assert found == pytest.approx(tfgrow.GaussNewtonEstimator(model).loss(data), rel=1e-5)
