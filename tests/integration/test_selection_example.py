"""Toy data of known right width: growth goes where it is needed, and stops about there."""

import keras
import numpy as np
import pytest
from keras import layers

import tfgrow

HIDDEN, BOTTLENECK = 6, 2
"""Width of the teacher's layers: the student starts with too few hidden units, and with the right
bottleneck after them."""


def teacher(x):
    """Units of tanh on orthogonal directions -> a bottleneck -> targets, all of size about one."""
    rng = np.random.default_rng(3)
    directions = np.linalg.qr(rng.standard_normal((x.shape[1], x.shape[1])))[0][:, :HIDDEN]
    hidden = np.tanh(2.0 * x @ directions)
    signs = np.where(rng.standard_normal((HIDDEN, BOTTLENECK)) > 0, 1.0, -1.0)
    mixed = hidden @ signs / np.sqrt(HIDDEN)
    outward = rng.standard_normal((BOTTLENECK, 4))
    return (mixed @ outward).astype("float32")


def data(samples, seed):
    x = np.random.default_rng(seed).standard_normal((samples, 8)).astype("float32")
    return x, teacher(x)


def student(hidden, bottleneck=BOTTLENECK, activation=None):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(hidden, activation="tanh", name="hidden"),
            layers.Dense(bottleneck, activation, name="bottleneck"),
            layers.Dense(4, name="out"),
        ]
    )
    model = tfgrow.convert(model)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


@pytest.mark.slow
def test_growth_finds_the_layer_and_the_width():
    model, train, held_out = student(2), data(4096, 1), data(1024, 2)
    oracle = tfgrow.GaussNewtonOracle(
        "loss", growth_per_step=2, new_units=6, min_gain_per_param=2e-4, max_params=2000, seed=0
    )
    growth = tfgrow.callbacks.Growth(oracle, data=train, every=4, verbose=0)
    before = model.evaluate(*held_out, verbose=0)
    model.fit(*train, epochs=40, batch_size=64, callbacks=[growth], verbose=0)
    widths = {site.name: site.units for site in tfgrow.find_sites(model)}
    grew = [event for event in growth.events if event.status == "applied"]
    assert grew, "nothing grew"
    assert all("bottleneck" not in event.widths for event in grew[:2]), "grew the wrong layer"
    assert HIDDEN <= widths["hidden"] <= HIDDEN + 3, widths
    assert widths["bottleneck"] <= BOTTLENECK + 1, widths
    assert model.evaluate(*held_out, verbose=0) < 0.02 * before
    assert all(event.measured_change <= 0 for event in grew)
    assert growth.events[-1].status != "applied", "it would have gone on"
