"""What the tests of GradMax and TINY share: data as they are, and the numbers independently."""

import keras
import numpy as np
import pytest
from keras import layers

import tfgrow
from tests.cases import CASES
from tfgrow.capture.batches import batches_of
from tfgrow.oracle.data import GrowthData

FAST = ("conv_bn_relu", "residual", "residual_stream", "several_consumers", "perceptron")
EVERY_CASE = [
    pytest.param(case.name, marks=[] if case.name in FAST else [pytest.mark.slow]) for case in CASES
]


def all_of(data, batch_size=256):
    """A dataset as the data of one step, all of it to learn on."""
    batches = list(batches_of(data, batch_size))
    return GrowthData(batches, [], [])


def two_layers(activation=None, units=4, outputs=3, use_bias=True):
    """Dense - Dense with the squared error, with biases as if it had been trained."""
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(
                units, activation, name="hidden", bias_initializer=keras.initializers.RandomNormal()
            ),
            layers.Dense(outputs, use_bias=use_bias, name="out"),
        ]
    )
    model = tfgrow.convert(model)
    model.compile("sgd", "mse")
    return model


def gaussian_data(samples=64, inputs=5, outputs=3, seed=0):
    """Inputs that do not have mean zero, and targets that no layer explains."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, inputs)) * rng.uniform(0.5, 2, inputs) + 0.3
    y = rng.standard_normal((samples, outputs)) + (x[:, :1] * x[:, 1:2])
    return x.astype("float32"), y.astype("float32")


def loss_gradient(model, data):
    """Of the squared error of each sample at the output, `[N, O]`, by hand."""
    x, y = data
    return 2.0 * (model(x).numpy().astype("float64") - y) / y.shape[-1]


def pooled():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 3, padding="same", name="first")(inputs)
    x = layers.AveragePooling2D(2, name="pool")(x)
    x = layers.Conv2D(2, 3, padding="same", strides=2, name="second")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(3, name="out")(x))
